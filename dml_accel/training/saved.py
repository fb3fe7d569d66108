"""What the folder of a run tells about it, to whoever comes later."""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, UsageError


def saved_status(path: Path) -> str:
    """Return the status of the run in a folder; empty where it has none."""
    return str(_saved_state(path).get("status", ""))


def _saved_state(path: Path) -> dict[str, Any]:
    """Return the content of status.json; nothing where it cannot be read."""
    try:
        found = json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def state_of(path: Path) -> str:
    """Say in words how far the run in a folder is: a killed one could not say so itself."""
    known = _saved_state(path)
    status, step = str(known.get("status", "")) or "not begun", known.get("step")
    if status == "running":
        with contextlib.suppress(OSError), open(path / "run.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = "interrupted"  # nobody holds it
    return f"{status} at step {step}" if isinstance(step, int) else status


def is_done(path: Path) -> bool:
    """Whether the folder holds a finished run: results.json comes last, after the peers.

    Raises:
        UsageError: that cannot be told.
    """
    try:
        return (path / "results.json").stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"{path / 'results.json'} cannot be read: {error.strerror}") from error


def saved_description(path: Path) -> dict[str, Any]:
    """Return the content of config.json of the run in a folder.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        found = json.loads((path / "config.json").read_text())
        return {"config": found["config"], **found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / 'config.json'} cannot be read: {error}") from error


def saved_config(path: Path) -> Config:
    """Return the configuration of the run in a folder.

    Raises:
        UsageError: config.json cannot be read.
    """
    return Config.from_dict(saved_description(path)["config"])
