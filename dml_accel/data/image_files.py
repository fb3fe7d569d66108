"""Files below a folder: which are images, which lie beside them, and where links lead."""

import os
from collections.abc import Iterator
from pathlib import Path

from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.data.pixels import bounded_pixels, endings, opened

_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
# Texts that lie beside images: boxes and captions of other programs, notes, lists.
_BESIDE = frozenset(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .log .py "
    ".ipynb .names .md5 .sha1 .sha256".split()
)
_LOOKED_AT = 20  # files of unknown kind, to tell whether a folder holds images


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; links count as what they lead to."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not is_passed(e.name) and e.is_dir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error


def is_passed(name: str) -> bool:
    """Whether the system or a program keeps a file or folder of this name for itself."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS or name.lower() in _SYSTEM_FILES


def files_below(
    folder: Path, path: str, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the files below a folder and what the system knows of them; None for a broken link.

    Args:
        folder: where to look.
        path: what to call it.
        above: folders that contain it, by their identity.

    Raises:
        UsageError: a folder cannot be read, or a link leads to a folder above it.
    """
    waiting = [(folder, path, above)]
    while waiting:
        folder, path, above = waiting.pop()
        try:
            above = (*above, identity_of(folder))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_passed(entry.name):
                        continue
                    name = f"{path}/{entry.name}" if path else entry.name
                    try:
                        if not entry.is_dir():
                            yield name, entry.stat() if entry.is_file() else None
                            continue
                        in_a_circle = entry.is_symlink() and identity_of(Path(entry.path)) in above
                    except OSError:
                        yield name, None
                        continue
                    if in_a_circle:
                        raise UsageError(f"{entry.path} is a link to a folder above it: remove it")
                    waiting.append((Path(entry.path), name, above))
        except OSError as error:
            raise UsageError(f"{folder} cannot be read: {error.strerror}") from error


def identity_of(folder: Path) -> tuple[int, int]:
    """Return what two paths of one folder share."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def ending_of(path: str) -> str:
    """Return the ending of a file's name, as messages show it."""
    return printable(os.path.splitext(path)[1].lower()) or "no ending"


def kind_of(path: str) -> str:
    """Return what a file is by its ending: image, beside (a text), or unknown."""
    ending = os.path.splitext(path)[1].lower()
    if ending in endings():
        return "image"
    return "beside" if ending in _BESIDE else "unknown"


def is_image(path: Path) -> bool:
    """Whether Pillow recognises the content of a file whose ending says nothing."""
    try:
        with bounded_pixels(), opened(path):
            return True
    except Exception:  # Pillow raises many kinds for files that are no images
        return False


def has_image(folder: Path) -> bool:
    """Whether an image lies somewhere below a folder."""
    kinds = ((path, kind_of(path)) for path, stat in files_below(folder, "") if stat)
    unknown: list[str] = []
    for path, kind in kinds:
        if kind == "image":
            return True
        if kind == "unknown" and len(unknown) < _LOOKED_AT:
            unknown.append(path)
    return any(is_image(folder / path) for path in unknown)
