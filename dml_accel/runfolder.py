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

    def __init__(self, path: str | None, peers: list[str]) -> None:
        """Take ``path``, or a new ``runs/<time>-<cohort>`` where it is None."""
        self._given = path is not None
        self.path = Path(path) if path is not None else _default_path(peers)
        self.step = 0
        try:
            self._refuse_early()
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from error

    def _refuse_early(self) -> None:
        """Refuse what entering would refuse, as far as looking can tell, before long work."""
        for trace in _TRACES_OF_A_RUN:
            if self._given and (self.path / trace).exists():
                raise UsageError(
                    f"--output-dir {self.path} already holds a run ({trace}); name a new folder"
                )
        parent = self.path
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            raise self._cannot_be_made(f"{parent} is not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise self._cannot_be_made(f"{parent} is not writable")

    def _cannot_be_made(self, reason: str | None) -> UsageError:
        return UsageError(f"--output-dir {self.path} cannot be made: {reason}; name another folder")

    def _make(self) -> None:
        """Make the folder; one that was not asked for by name must be new."""
        stem, attempt = self.path, 1
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=self._given)
                return
            except FileExistsError:
                if self._given:
                    raise
                attempt += 1
                self.path = stem.with_name(f"{stem.name}-{attempt}")

    def __enter__(self) -> "RunFolder":
        try:
            self._make()
            self._lock = open(self.path / "run.lock", "a+")
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from error
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


def _default_path(peers: list[str]) -> Path:
    nets = [name.rpartition("-")[0] for name in peers]
    parts = [f"{net}x{nets.count(net)}" for net in dict.fromkeys(nets)]
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{'-'.join(parts)[:80]}"
