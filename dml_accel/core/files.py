"""Files that appear whole or not at all, and files of strangers, which are read up to a bound."""

import json
import os
from pathlib import Path
from typing import Any

LARGEST_JSON = 16 * 2**20  # bytes; a stranger's file is not read into memory whatever its size


class UnreadableError(RuntimeError):
    """A file cannot be read, or is longer than it may be; the text names it."""


def write_text(path: Path, content: str) -> None:
    """Write under a temporary name, then rename: a reader sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def can_be_made(folder: Path) -> bool:
    """Whether files could be written into a folder that is there, or could be made."""
    try:
        while not folder.exists():
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def read_at_most(path: Path, most: int) -> bytes:
    """Return a file's content of ``most`` bytes or less; one may be longer than it says.

    Raises:
        UnreadableError: it cannot be read, or is longer.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise UnreadableError(f"{path} has more than the {most:,} bytes that it may")
    return content


def strict_json(content: bytes) -> Any:
    """Return what JSON holds; NaN and Infinity are none.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    return json.loads(content, parse_constant=refuse)


def read_json(path: Path, most: int) -> dict[str, Any]:
    """Return the object in a JSON file of ``most`` bytes or less.

    Raises:
        UnreadableError: it cannot be read, is longer, or holds something else.
    """
    try:
        found = strict_json(read_at_most(path, most))
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is no JSON") from error
    if not isinstance(found, dict):
        raise UnreadableError(f"{path} is no JSON object")
    return found
