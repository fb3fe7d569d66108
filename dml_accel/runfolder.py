"""The run folder: who may write in it, its records, its status.

One writer holds ``run.lock`` by flock, which the system releases when the holder dies. Files
appear whole or not at all, except metrics.jsonl, which grows by flushed lines.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dml_accel.config import UsageError
from dml_accel.export import write_json

_TRACES_OF_A_RUN = ("config.json", "metrics.jsonl", "results.json", "status.json", "peers")


class RunFolder:
    """A folder that one run writes. Nothing is made before the context is entered.

    Raises:
        UsageError: the folder holds a run already, is in use, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self._refuse_early()

    def _refuse_early(self) -> None:
        """Refuse what entering would refuse, as far as looking can tell, before long work."""
        for trace in _TRACES_OF_A_RUN:
            if (self.path / trace).exists():
                raise UsageError(
                    f"--output-dir {self.path} already holds a run ({trace}); name a new folder"
                )
        parent = self.path
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            raise UsageError(f"--output-dir {self.path} cannot be made: {parent} is not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"--output-dir {self.path} cannot be made: {parent} is not writable")

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "run.lock", "a+")
        except OSError as error:
            raise UsageError(
                f"--output-dir {self.path} cannot be made: {error.strerror}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UsageError(f"--output-dir {self.path} is in use by {holder}") from error
        self._refuse_early()  # a run may have come and gone since the first look
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        self._metrics = open(self.path / "metrics.jsonl", "a")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.status("done")
        else:
            self.status("failed", f"{type(error).__name__}: {error}".rstrip(": "))
        self._metrics.close()
        self._lock.close()

    def status(self, state: str, reason: str | None = None) -> None:
        """Write status.json: ``running``, ``done`` or ``failed``, why, and the steps taken."""
        self.write("status.json", {"status": state, "reason": reason, "step": self.step})

    def event(self, event: str, step: int, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and flush it."""
        self.step = step
        line = {"event": event, "step": step, "epoch": epoch, "time": round(time.time(), 3)}
        self._metrics.write(json.dumps(line | values, allow_nan=False) + "\n")
        self._metrics.flush()

    def write(self, name: str, content: Any) -> None:
        """Write one JSON file, whole or not at all."""
        write_json(self.path / name, content)


def default_path(peers: list[str]) -> Path:
    """Return ``runs/<time>-<cohort>``, a folder that is not there yet."""
    nets = [name.rpartition("-")[0] for name in peers]
    parts = [f"{net}x{nets.count(net)}" for net in dict.fromkeys(nets)]
    stem = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{'-'.join(parts)[:80]}"
    path, attempt = stem, 1
    while path.exists():
        attempt += 1
        path = stem.with_name(f"{stem.name}-{attempt}")
    return path
