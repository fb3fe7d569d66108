"""The folder of a run: its lock, its records and its status; and how a saved one is read.

    config.json      the configuration, versions and command
    status.json      running, stopped, done or failed
    metrics.jsonl    one record per line
    results.json     the last evaluation, written last
    checkpoints/     see checkpoint.py
    peers/<name>/    see models/peer_folder.py
    run.lock         names the process that writes here

The writer holds ``run.lock`` by flock, which the system releases when the process dies. Files
appear whole or not at all, except metrics.jsonl, which grows by flushed lines.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from dml_accel.core.config import Config
from dml_accel.core.errors import StoppedError, UsageError
from dml_accel.core.files import read_json, write_json, write_text
from dml_accel.training.trackers import FOLDER

_MARKS_OF_A_RUN = ("config.json", "status.json", "checkpoints")
_FILES_OF_A_RUN = (*_MARKS_OF_A_RUN, "metrics.jsonl", "results.json", "peers", FOLDER)


class LockedFolder:
    """A folder with a single writer. Nothing is created before the context is entered.

    Args:
        path: of the folder; None for a new ``runs/<time>-<label>``.
        label: see above.

    Raises:
        UsageError: the folder is in use, holds what must not be overwritten, or cannot be created.
    """

    def __init__(self, path: str | Path | None, label: str) -> None:
        self._given = path is not None
        self.path = Path(path or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{label}")
        try:
            self._refuse_early()
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from error

    def _refuse_content(self) -> None:
        """Refuse a folder whose content must not be overwritten."""

    def _refuse_early(self) -> None:
        """Refuse what entering would refuse, as far as can be told without writing."""
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
        return UsageError(
            f"--output-dir {self.path} cannot be created: {reason}; name another folder"
        )

    def _make(self) -> None:
        """Create the folder; one that was not named by the user must be new."""
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
        self._refuse_early()  # another run may have used the folder since the first check
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


class SavedRun:
    """The folder of a run as it was left: its files are read here and nowhere else.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def status(self) -> str:
        """The status in status.json; empty if there is none."""
        return str(self._status().get("status", ""))

    @property
    def state(self) -> str:
        """How far the run has come, in words; a killed run could not write that itself."""
        found = self._status()
        status, step = str(found.get("status", "")) or "not started", found.get("step")
        if status == "running":
            with contextlib.suppress(OSError), open(self.path / "run.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                status = "interrupted"  # nobody holds the lock
        return f"{status} at step {step}" if isinstance(step, int) else status

    @property
    def is_done(self) -> bool:
        """Whether the run is finished: results.json is written last, after the peers.

        Raises:
            UsageError: results.json cannot be accessed.
        """
        path = self.path / "results.json"
        try:
            return path.stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error

    @property
    def has_description(self) -> bool:
        """Whether there is a config.json."""
        return (self.path / "config.json").exists()

    @property
    def description(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            UsageError: it cannot be read, or does not describe a run.
        """
        path = self.path / "config.json"
        found = read_json(path)
        if not isinstance(found.get("config"), dict):
            raise UsageError(f"{path} does not describe a run: it has no config")
        return found

    @property
    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            UsageError: config.json cannot be read, or is of another version.
        """
        return Config(**self.description["config"])

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            UsageError: it cannot be read.
        """
        return read_json(self.path / "results.json")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl.

        Raises:
            UsageError: it cannot be read, or a line is not a record.
        """
        path = self.path / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error

    def _status(self) -> dict[str, Any]:
        """Return the content of status.json; empty if it cannot be read."""
        try:
            return read_json(self.path / "status.json")
        except UsageError:
            return {}


class Follower(Protocol):
    """Receives every record of a run."""

    def take(self, record: dict[str, Any]) -> None:
        """Receive a line of metrics.jsonl."""

    def close(self) -> None:
        """Finish: there are no more records."""


class RunFolder(LockedFolder):
    """The folder of one run.

    Args:
        path: the folder, or None for a new one.
        label: see ``LockedFolder``.
        resumes: whether a run in the folder is resumed, not refused.

    Raises:
        UsageError: also if the folder holds a run already.
    """

    def __init__(self, path: str | Path | None, label: str, resumes: bool = False) -> None:
        self._resumes = resumes
        self.step = 0
        self._metrics: TextIO | None = None
        self._started = False
        self._follower: Follower | None = None
        self._writing_status = threading.Lock()
        super().__init__(path, label)

    def _refuse_content(self) -> None:
        # A run writes one of these before anything else.
        is_run = any((self.path / name).exists() for name in _MARKS_OF_A_RUN)
        if self._resumes and is_run:
            return
        for trace in _FILES_OF_A_RUN:
            if not (self.path / trace).exists():
                continue
            if self._resumes:
                raise UsageError(
                    f"--output-dir {self.path} holds {trace} but no run that could be resumed; "
                    "name another folder"
                )
            raise UsageError(
                f"--output-dir {self.path} already holds a run ({trace}); name a new folder, or "
                "resume the run with --resume auto"
            )

    def set_running(self, step: int) -> None:
        """Set the status to running, if an earlier attempt has left another one."""
        if (self.path / "status.json").exists():
            self.step, self._started = step, True
            self.status("running")

    def begin(self, step: int | None, again: bool) -> None:
        """Open the records of a run that has taken ``step`` steps.

        Records of later steps are removed, because they will be written again.

        Args:
            step: of the checkpoint that is resumed. None without one: what a run that left no
                checkpoint has written is removed. Results of a run with fewer steps are removed in
                any case; the records hold its evaluations.
            again: whether the evaluation of that step is repeated.
        """
        self.step, self._started = step or 0, True
        self.status("running")
        path, fewer = self.path / "metrics.jsonl", ("results.json", "results.md")
        for trace in _FILES_OF_A_RUN if step is None else fewer:
            if trace == "status.json":
                continue  # it marks the folder as a run, should we be interrupted here
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
        # A refused run has not started, and a full disk must not hide why a run has ended.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            if isinstance(error, StoppedError):
                self.status("stopped", str(error))
            elif error and (self._started or not isinstance(error, UsageError)):
                self.fail(error)
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
        with self._writing_status:
            self.write("status.json", {"status": state, "reason": reason, "step": self.step})

    def fail(self, error: BaseException) -> None:
        """Write that the run has failed, and why; any thread may."""
        self.status("failed", f"{type(error).__name__}: {error}".rstrip(": "))

    def follow_with(self, follower: Follower) -> None:
        """Pass every record to a follower from now on, until the folder is closed."""
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
def explaining_stop(folder: LockedFolder | None, *words: str) -> Iterator[None]:
    """Add to the text of a stop which flags resume the run in the folder."""
    try:
        yield
    except StoppedError as stopped:
        where = " ".join(("--output-dir", str(folder.path), *words)) if folder else ""
        raise StoppedError(f"{stopped}; the same command with {where} resumes it") from None


def _is_before(line: str, step: int, again: bool) -> bool:
    """Whether a record precedes what comes after ``step`` steps; a torn line does not."""
    try:
        record = json.loads(line)
        event, at = record["event"], int(record["step"])
    except (ValueError, KeyError, TypeError):
        return False
    return at < step or (at == step and event != "end" and not (again and event == "eval"))
