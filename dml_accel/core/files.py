"""Write files whole or not at all; read untrusted files up to a size limit."""

import codecs
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
    """Write a text file in UTF-8, whole or not at all; see ``as_utf8``."""
    with replacing(path) as temporary:
        temporary.write_text(as_utf8(content), encoding="utf-8")


def as_utf8(text: str) -> str:
    r"""Return a text that UTF-8 can write.

    Names of files are bytes to the system: those that are not UTF-8 become ``\udce9`` and the like.
    """
    return text.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """Yield a path to the same file for safetensors, which reads none that is not UTF-8."""
    if as_utf8(str(path)) == str(path):
        yield path
        return
    with open(path, "rb") as file:
        yield Path("/dev/fd") / str(file.fileno())


def text_of(path: Path, content: bytes) -> str:
    """Return the text of a file that people write: UTF-8, with or without a mark at its start.

    Raises:
        UnreadableError: it is in another encoding.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
    try:
        if not wide:
            return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is not in UTF-8 ({error}); save it as UTF-8") from error
    raise UnreadableError(f"{path} is in UTF-16, or not a text; save it as UTF-8")


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
