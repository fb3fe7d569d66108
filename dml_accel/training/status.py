"""status.json of a run: kept up to date while it runs, and read when it may have been killed.

    status      running, stopped, done or failed
    reason      why it was stopped or has failed
    step        optimizer steps taken
    time        when the status was set
    heartbeat   the last sign of life: renewed every ten seconds while the run is running
    host, pid   of the process that writes it

Times are in ISO 8601, with their zone.
"""

import contextlib
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dml_accel.core.errors import UsageError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.locks import Lock, lock
from dml_accel.core.tables import printable

FILE = "status.json"
LOCK = "run.lock"
RUNNING = "running"
_SECONDS_BETWEEN_BEATS = 10.0
# A file system of a network may show a file's old content for a minute.
_SECONDS_TO_LIVE = 120.0


class StatusFile:
    """Writes status.json, from any thread; a thread of its own renews it while the run is running.

    Args:
        folder: of the run.

    Attributes:
        step: optimizer steps taken; set it at any time.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.step = 0
        self._content: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, status: str, reason: str | None = None) -> OSError | None:
        """Write a status; return why it cannot be written, because that must not end a run."""
        with self._writing:
            self._content = {"status": status, "reason": reason, "time": _now()}
            problem = self._write()
        if status == RUNNING and self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return problem

    def close(self) -> None:
        """Stop renewing the file."""
        self._closing.set()
        if self._thread:
            self._thread.join(1.0)  # no longer: it may wait for a disk

    def _beat(self) -> None:
        seconds = min(
            1.0, _SECONDS_BETWEEN_BEATS
        )  # soon at first, because short runs are looked at as well
        while not self._closing.wait(seconds):
            seconds = min(2 * seconds, _SECONDS_BETWEEN_BEATS)
            with self._writing:
                if self._content["status"] != RUNNING or self._closing.is_set():
                    return
                self._write()

    def _write(self) -> OSError | None:
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": _now()}
        try:
            write_json(self._path, self._content | {"step": self.step} | writer)
        except OSError as error:
            return error
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


# ---------------------------------------------------------------- reading


def read_status(folder: Path) -> dict[str, Any]:
    """Return the content of a run's status.json; empty if it cannot be read."""
    try:
        return read_json(folder / FILE)
    except UsageError:
        return {}


def is_alive(folder: Path) -> bool:
    """Whether a process still writes to the folder of a run whose status is running."""
    found = read_status(folder)
    here = found.get("host") in (None, socket.gethostname())
    with contextlib.suppress(OSError), open(folder / LOCK) as file:
        became, _ = lock(file, wait=False, shared=True)
        if became is Lock.ANOTHERS:
            return True
        if became is Lock.OURS and here:
            return False
    # There are no locks, or none that processes of another machine would see.
    return is_beating(found)


def is_beating(found: dict[str, Any]) -> bool:
    """Whether a running run's status.json was renewed of late, by a process that exists.

    Args:
        found: its content.
    """
    try:
        age = (datetime.now(UTC) - datetime.fromisoformat(found["heartbeat"])).total_seconds()
    except (KeyError, TypeError, ValueError):  # there is none, or without a zone
        return False
    return found.get("status") == RUNNING and age < _SECONDS_TO_LIVE and not _is_gone(found)


def _is_gone(found: dict[str, Any]) -> bool:
    pid = found.get("pid")
    if found.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it exists, and is another user's
        return False
    return False


def writer_of(found: dict[str, Any]) -> str:
    """Return which process has written a status.json, and when, in words."""
    return printable(
        f"process {found.get('pid')} on {found.get('host')}, last sign of life "
        f"{found.get('heartbeat')}"
    )
