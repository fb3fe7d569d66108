"""Folders that one process writes: who may, a run's records and its status.

One writer holds ``run.lock`` by flock, which the system releases when the holder dies. Files
appear whole or not at all, except metrics.jsonl, which grows by flushed lines.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from dml_accel.core.config import UsageError
from dml_accel.core.files import write_json, write_text
from dml_accel.distributed.launch import StoppedError
from dml_accel.training.trackers import FOLDER

_SIGNS_OF_A_RUN = ("config.json", "status.json", "checkpoints")
_TRACES_OF_A_RUN = (*_SIGNS_OF_A_RUN, "metrics.jsonl", "results.json", "peers", FOLDER)


class LockedFolder:
    """A folder with one writer. Nothing is made before the context is entered.

    Raises:
        UsageError: the folder is in use, holds what must not be overwritten, or cannot be made.
    """

    def __init__(self, path: str | Path | None, label: str) -> None:
        """Take ``path``, or a new ``runs/<time>-<label>`` where it is None."""
        self._given = path is not None
        self.path = Path(path or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{label}")
        try:
            self._refuse_early()
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from error

    def _refuse_content(self) -> None:
        """Refuse a folder whose content must not be overwritten."""

    def _refuse_early(self) -> None:
        """Refuse what entering would refuse, as far as looking can tell, before long work."""
        if self._given:
            self._refuse_content()
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

    def __enter__(self) -> Self:
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
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    def write(self, name: str, content: Any) -> None:
        """Write one JSON file, whole or not at all."""
        write_json(self.path / name, content)


class Follower(Protocol):
    """What hears of every record of a run."""

    def take(self, record: dict[str, Any]) -> None:
        """Hear of a line of metrics.jsonl."""

    def close(self) -> None:
        """Hear that there are no more."""


class RunFolder(LockedFolder):
    """The folder of one run.

    Args:
        path: the folder, or None for a new one.
        label: see ``LockedFolder``.
        goes_on: a run in it is gone on with instead of refused.

    Raises:
        UsageError: also where the folder holds a run already.
    """

    def __init__(self, path: str | Path | None, label: str, goes_on: bool = False) -> None:
        self._goes_on = goes_on
        self.step = 0
        self._metrics: TextIO | None = None
        self._taken_up = False
        self._follower: Follower | None = None
        super().__init__(path, label)

    def _refuse_content(self) -> None:
        # A run says so, in one of these, before it writes anything else.
        is_run = any((self.path / name).exists() for name in _SIGNS_OF_A_RUN)
        if self._goes_on and is_run:
            return
        for trace in _TRACES_OF_A_RUN:
            if not (self.path / trace).exists():
                continue
            if self._goes_on:
                raise UsageError(
                    f"--output-dir {self.path} holds {trace} but no run to go on with; name "
                    "another folder"
                )
            raise UsageError(
                f"--output-dir {self.path} already holds a run ({trace}); name a new folder, or "
                "--resume auto to go on with it"
            )

    def take_up(self, step: int) -> None:
        """Say that the run is on its way, where an earlier attempt has left another status."""
        if (self.path / "status.json").exists():
            self.step, self._taken_up = step, True
            self.status("running")

    def begin(self, step: int | None, again: bool) -> None:
        """Open the records of a run that has ``step`` steps behind it.

        Those of later steps are cut off: they will be written again.

        Args:
            step: the checkpoint's; without one it is None, and what a run without any left behind
                is cleared away. Results of a run with fewer steps are cleared away in any case:
                the records have its evaluations.
            again: whether the evaluation of that step comes again.
        """
        self.step, self._taken_up = step or 0, True
        self.status("running")
        path, fewer = self.path / "metrics.jsonl", ("results.json", "results.md")
        for trace in _TRACES_OF_A_RUN if step is None else fewer:
            if trace == "status.json":
                continue  # it says that this is a run, whatever stops us here
            if (self.path / trace).is_dir():
                shutil.rmtree(self.path / trace)
            else:
                (self.path / trace).unlink(missing_ok=True)
        if path.exists():
            lines = [line for line in path.read_text(errors="replace").split("\n") if line]
            kept = [line for line in lines if _is_before(line, step or 0, again)]
            write_text(path, "".join(line + "\n" for line in kept))
        self._metrics = open(path, "a")  # noqa: SIM115

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was refused has begun nothing, and a full disk must not hide why the run ended.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            if isinstance(error, StoppedError):
                self.status("stopped", str(error))
            elif error and (self._taken_up or not isinstance(error, UsageError)):
                self.status("failed", f"{type(error).__name__}: {error}".rstrip(": "))
            elif not error:
                self.status("done")
        if self._follower:
            self._follower.close()
        with contextlib.suppress(OSError):
            if self._metrics:
                self._metrics.close()
        super().__exit__(kind, error, trace)

    def status(self, state: str, reason: str | None = None) -> None:
        """Write status.json: running, stopped, done or failed, why, and the steps taken."""
        self.write("status.json", {"status": state, "reason": reason, "step": self.step})

    def tell(self, follower: Follower) -> None:
        """Let a follower hear of every record from here on, until the folder is left."""
        self._follower = follower

    def event(self, event: str, step: int, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and flush it."""
        self.step = step
        line = {"event": event, "step": step, "epoch": epoch, "time": round(time.time(), 3)}
        assert self._metrics, "begin comes first"
        self._metrics.write(json.dumps(line | values, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._follower:
            self._follower.take(line | values)


@contextlib.contextmanager
def remedy_of_a_stop(folder: LockedFolder | None, *words: str) -> Iterator[None]:
    """Let a stop say, once the folder is left, which words of the command line go on in it."""
    try:
        yield
    except StoppedError as stopped:
        where = " ".join(("--output-dir", str(folder.path), *words)) if folder else ""
        raise StoppedError(f"{stopped}; the same command with {where} goes on") from None


def _is_before(line: str, step: int, again: bool) -> bool:
    """Whether a record is older than what comes after ``step`` steps; a torn one is not."""
    try:
        record = json.loads(line)
        event, at = record["event"], int(record["step"])
    except (ValueError, KeyError, TypeError):
        return False
    return at < step or (at == step and event != "end" and not (again and event == "eval"))
