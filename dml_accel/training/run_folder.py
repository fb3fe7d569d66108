"""The folder of a run: its lock, its records and its status; and how a saved one is read.

    config.json      the configuration, versions and command
    status.json      running, stopped, done or failed, and the last sign of life; see status.py
    metrics.jsonl    one record per line
    results.json     the last evaluation, written last
    bad-images.txt   images that could not be read, if any; see bad_images.py
    checkpoints/     see checkpoint.py
    peers/<name>/    see models/peer_folder.py
    peers-averaged/  with --ema, the same of the averages of the weights
    peers-best/      with --keep best, the same of each peer's best evaluation
    run.lock         names the process that writes here

The writer holds ``run.lock`` by flock, which the system releases when the process dies. Files
appear whole or not at all, except metrics.jsonl, which grows by flushed lines.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from dml_accel.core.config import Config, saved_config
from dml_accel.core.errors import StoppedError, UnreadableError, UsageError, one_line
from dml_accel.core.files import parse_json, read_json, write_json, write_text
from dml_accel.core.locks import Lock, lock
from dml_accel.core.tables import printable
from dml_accel.core.versions import Caller
from dml_accel.training import checkpoint
from dml_accel.training.status import FILE as STATUS
from dml_accel.training.status import (
    LOCK,
    RUNNING,
    StatusFile,
    is_alive,
    is_beating,
    read_status,
    writer_of,
)
from dml_accel.training.trackers import FOLDER, LOGS

CHECKPOINTS = "checkpoints"
BAD_IMAGES = "bad-images.txt"
# The folders of a run's networks, by what ``--weights`` calls them. A run removes what it has
# written there, so these are no names that somebody would export to.
WEIGHTS = {"last": "peers", "ema": "peers-averaged", "best": "peers-best"}
_LONGEST_NAME = 200  # characters of run.lock, which anybody may have written
_FILES_OF_A_RUN = (
    *("config.json", STATUS, CHECKPOINTS, "metrics.jsonl", "results.json"),
    *WEIGHTS.values(),
    FOLDER,
    BAD_IMAGES,
)
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# What schedulers and shells put into a folder before a run starts there.
_LOGS = (".out", ".err", ".log", ".txt", ".sh")


def mark_of_a_run(path: Path) -> str:
    """Return the file by which a folder shows that it holds a run, finished or not; empty if none.

    A run writes one of these before anything else. Many other programs write a file or folder of
    such a name. One that cannot be read counts: a power failure may have damaged it.
    """
    for name, keys in (("config.json", {"config", "versions"}), (STATUS, {"status", "step"})):
        try:
            found = read_json(path / name)
        except UnreadableError as error:
            if os.path.lexists(path / name) and not isinstance(error.__cause__, _NO_FILE):
                return name
        else:
            if keys <= found.keys():
                return name
    return CHECKPOINTS if checkpoint.named(path / CHECKPOINTS) else ""


def refuse_foreign(path: Path, lacks: str) -> None:
    """Refuse a folder that holds files, other than hidden ones, logs and our lock.

    Args:
        path: of the folder.
        lacks: what it does not hold, for the message.

    Raises:
        UsageError: the text names some of the files.
    """
    if not path.is_dir():
        return
    found = sorted(entry.name for entry in path.iterdir() if not _is_harmless(entry))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        names = printable(", ".join(found[:3]))
        raise UsageError(
            f"--output-dir {path} holds {names}{more} but {lacks}; name another folder"
        )


def _is_harmless(entry: Path) -> bool:
    if entry.name.startswith(".") or entry.name in (LOCK, LOGS, "lost+found"):
        return True
    return entry.suffix in _LOGS and entry.is_file()


def refuse_inside(path: Path, images: Sequence[Path]) -> None:
    """Refuse a folder within those that images are read from: the next command would read it.

    Raises:
        UsageError: see above.
    """
    for folder in images:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"--output-dir {path} lies in {folder}, where images are read from, and would "
                "change what is read: name a folder elsewhere"
            )


# Locks that are held. A process that is forked, such as a worker of a caller's DataLoader, must not
# hold one on after this process was killed.
_HELD: "weakref.WeakSet[TextIO]" = weakref.WeakSet()


def _close_inherited() -> None:
    for held in list(_HELD):
        held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class LockedFolder:
    """A folder with a single writer. Nothing is created before the context is entered.

    Args:
        path: of the folder; None for a new ``runs/<time>-<label>``.
        label: see above.
        images: folders that a new one must not lie in.
        part: of a folder that is locked already.

    Raises:
        UsageError: the folder is in use, holds what must not be overwritten, or cannot be created.
    """

    def __init__(
        self, path: str | Path | None, label: str, images: Sequence[Path] = (), part: bool = False
    ) -> None:
        self._given, self._images, self._part = path is not None, images, part
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
        else:
            refuse_inside(self.path, self._images)
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
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from error
        path = self.path / LOCK
        try:
            self._lock = open(path, "a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be opened: {error.strerror}; it shows that a process uses the "
                "folder: name another --output-dir"
            ) from error
        _HELD.add(self._lock)
        try:
            self._take_lock()
            self._refuse_early()  # another run may have used the folder since the first check
        except UsageError:
            self._lock.close()
            raise
        with contextlib.suppress(OSError):  # on a full disk the lock has no name
            os.ftruncate(self._lock.fileno(), 0)
            name = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.write(self._lock.fileno(), name.encode())
        return self

    def _take_lock(self) -> None:
        became, words = lock(self._lock, wait=False)
        if became is Lock.OURS:
            return
        if became is Lock.ANOTHERS:
            self._lock.seek(0)
            holder = printable(self._lock.read(_LONGEST_NAME).strip()) or "another process"
            raise UsageError(f"--output-dir {self.path} is in use by {holder}")
        found, seen = read_status(self.path), ""
        if is_beating(found) and found.get("pid") != os.getpid():
            seen = writer_of(found)
            if found.get("host") == socket.gethostname():
                raise UsageError(f"--output-dir {self.path} is in use by {seen}")
        if not self._part:
            print(
                f"warning: {self.path} cannot be locked (its file system has no flock: {words}): "
                f"make sure that no other process writes there{f', such as {seen}' * bool(seen)}",
                file=sys.stderr,
                flush=True,
            )

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
        """The status in status.json, empty if there is none; but done if there are results.

        Raises:
            UsageError: results.json cannot be accessed.
        """
        found = str(read_status(self.path).get("status", ""))
        # A run that is killed after it has written its results cannot say so.
        return "done" if found in ("", RUNNING) and self.is_done else found

    @property
    def state(self) -> str:
        """How far the run has come, in words; a killed run could not write that itself."""
        words, found = self.status or "not started", read_status(self.path)
        seen = ""
        if words == RUNNING and not is_alive(self.path):
            words = "interrupted"
            if "heartbeat" in found:
                seen = f", last sign of life {found['heartbeat']}"
        # A run that is killed between two signs of life may have come as far as its checkpoint.
        saved = [checkpoint.step_of(one) for one in checkpoint.named(self.path / CHECKPOINTS)[:1]]
        steps = [step for step in (found.get("step"), *saved) if isinstance(step, int)]
        return printable((f"{words} at step {max(steps)}" if steps else words) + seen)

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
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, good or not."""
        return bool(checkpoint.named(self.path / CHECKPOINTS))

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
        return saved_config(self.description)

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
            with open(path, "rb") as file:
                return [parse_json(path, line) for line in file]
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error


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
        dataset, part: see ``LockedFolder``.

    Raises:
        UsageError: also if the folder holds a run already, or files of something else.
    """

    def __init__(
        self,
        path: str | Path | None,
        label: str,
        resumes: bool = False,
        images: Sequence[Path] = (),
        part: bool = False,
    ) -> None:
        self._resumes = resumes
        self._metrics: TextIO | None = None
        self._started = False
        self._follower: Follower | None = None
        super().__init__(path, label, images, part)
        self._status = StatusFile(self.path)

    def _refuse_content(self) -> None:
        mark = mark_of_a_run(self.path)
        if mark and not self._resumes:
            raise UsageError(
                f"--output-dir {self.path} already holds a run ({mark}); name a new folder, or "
                "resume the run with --resume auto"
            )
        if not mark:
            what = "no run that could be resumed" if self._resumes else "no run"
            refuse_foreign(self.path, what)
            refuse_inside(self.path, self._images)

    def __enter__(self) -> Self:
        super().__enter__()
        self._status = StatusFile(self.path)  # the folder may have got another name
        step = read_status(self.path).get("step")  # of an earlier attempt, until this one begins
        self._status.step = step if isinstance(step, int) else 0
        return self

    def print_restart(self) -> None:
        """Say that an earlier attempt, which has left no checkpoint, is lost; if there was one."""
        if (self.path / "metrics.jsonl").exists():
            print(
                f"{self.path} has no checkpoint yet: starting from step 0; what the interrupted "
                "attempt has recorded there is replaced",
                file=sys.stderr,
                flush=True,
            )

    def set_running(self, step: int) -> None:
        """Set the status to running, if an earlier attempt has left another one."""
        if (self.path / STATUS).exists():
            self._status.step, self._started = step, True
            self.status(RUNNING)

    def set_done(self) -> None:
        """Correct the status of a run that was killed between its results and its status."""
        found = read_status(self.path)
        if found.get("status") == RUNNING and SavedRun(self.path).is_done:
            with contextlib.suppress(UsageError), self:  # it may be in use, or not writable
                pass  # entering has kept the step

    def begin(self, step: int | None, again: bool) -> None:
        """Open the records of a run that has taken ``step`` steps.

        Records of later steps are removed, because they will be written again.

        Args:
            step: of the checkpoint that is resumed. None without one: what a run that left no
                checkpoint has written is removed. Results of a run with fewer steps are removed in
                any case; the records hold its evaluations.
            again: whether the evaluation of that step is repeated.
        """
        self._status.step, self._started = step or 0, True
        self.status(RUNNING)
        path = self.path / "metrics.jsonl"
        # The flags may not ask for averages or best weights any more.
        fewer = ("results.json", "results.md", WEIGHTS["ema"], WEIGHTS["best"])
        for trace in _FILES_OF_A_RUN if step is None else fewer:
            if trace == STATUS:
                continue  # it marks the folder as a run, should we be interrupted here
            if (self.path / trace).is_dir():
                shutil.rmtree(self.path / trace)
            else:
                (self.path / trace).unlink(missing_ok=True)
        if path.exists():
            lines = [
                line
                for line in path.read_text(encoding="utf-8", errors="replace").split("\n")
                if line
            ]
            kept = [line for line in lines if _is_before(line, step or 0, again)]
            write_text(path, "".join(line + "\n" for line in kept))
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A refused run has not started; and whatever happens to one that has written its results,
        # it is done.
        is_done = False
        with contextlib.suppress(UsageError):
            is_done = self._metrics is not None and SavedRun(self.path).is_done
        if is_done or not error:
            self.status("done")
        elif isinstance(error, StoppedError):
            self.status("stopped", str(error))
        elif isinstance(error, GeneratorExit) and self._started:
            self.status("stopped", "the caller has left learn before its end")
        elif error and (self._started or not isinstance(error, UsageError)):
            self.fail(error)
        self._status.close()
        if self._follower:
            self._follower.close()
        with contextlib.suppress(OSError):
            if self._metrics:
                self._metrics.close()
        super().__exit__(kind, error, trace)

    def status(self, state: str, reason: str | None = None) -> None:
        """Write status.json: running, stopped, done or failed, and why; warn if that fails."""
        problem = self._status.set(state, reason)
        if problem:
            print(f"warning: {self.path / STATUS}: {one_line(problem)}", file=sys.stderr)

    def fail(self, error: BaseException) -> None:
        """Write that the run has failed, and why; any thread may."""
        # Without a warning: the main thread may hold the lock of stderr.
        self._status.set("failed", f"{type(error).__name__}: {error}".rstrip(": "))

    def has_taken(self, step: int) -> None:
        """Count the steps, for status.json."""
        self._status.step = step

    def follow_with(self, follower: Follower) -> None:
        """Pass every record to a follower from now on, until the folder is closed."""
        self._follower = follower

    def event(self, event: str, step: int, epoch: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and flush it."""
        self._status.step = step
        line = {"event": event, "step": step, "epoch": epoch, "time": round(time.time(), 3)}
        assert self._metrics, "begin comes first"
        self._metrics.write(json.dumps(line | values, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._follower:
            self._follower.take(line | values)


@contextlib.contextmanager
def explaining_stop(folder: LockedFolder | None, caller: Caller, **flags: str) -> Iterator[None]:
    """Add to the text of a stop which flags resume the run in the folder."""
    try:
        yield
    except StoppedError as stopped:
        if folder is None:  # another process prints
            raise
        again = caller.again_with(output_dir=str(folder.path), **flags)
        raise StoppedError(f"{stopped}; {again} resumes it") from None


def _is_before(line: str, step: int, again: bool) -> bool:
    """Whether a record precedes what comes after ``step`` steps; a torn line does not."""
    try:
        record = json.loads(line)
        event, at = record["event"], int(record["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
    return at < step or (at == step and event != "end" and not (again and event == "eval"))
