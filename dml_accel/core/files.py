"""Write files whole or not at all; read untrusted files up to a size limit."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dml_accel.core.errors import UnreadableError

LARGEST_JSON = 16 * 2**20  # bytes: an untrusted file must not fill the memory


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to ``path`` at the end.

    A reader sees the whole new file or the old one; after an error the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        # Not after a success: the name may by then be another process's.
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinities are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def can_be_made(folder: Path) -> bool:
    """Whether a folder exists and is writable, or could be created."""
    try:
        while not folder.exists():
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def read_at_most(path: Path, most: int) -> bytes:
    """Return the content of a file of at most ``most`` bytes, whatever size the system reports.

    Raises:
        UnreadableError: it cannot be read, or is longer.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise UnreadableError(f"{path} has more than the allowed {most:,} bytes")
    return content


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the object that the content of a JSON file holds.

    Raises:
        UnreadableError: it is not JSON, which has no NaN and no Infinity, or not an object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        found = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is not valid JSON") from error
    if not isinstance(found, dict):
        raise UnreadableError(f"{path} does not hold a JSON object")
    return found


def read_json(path: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Return the object in an untrusted JSON file of at most ``most`` bytes.

    Raises:
        UnreadableError: it cannot be read, is longer, or does not hold a JSON object.
    """
    return parse_json(path, read_at_most(path, most))
