"""The folder of decoded images: what is kept in it, how much it may hold, what is removed first.

Nothing here imports torch. A set of images has one name in the folder, with these endings:

    .safetensors   its images
    .json          the state of the files that they come from; its time is that of the last use
    .parts/        those that are decoded, of a set that is not complete
    .lock          held by the process that reads, decodes or removes them
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import LARGEST_JSON, parse_json, read_json
from dml_accel.core.locks import Lock, lock

FORMAT = 3  # of the images; those of another version are not read
LIMIT_VARIABLE = "DML_CACHE_LIMIT"
PARTS, ABOUT = ".parts", "about.json"
_USUAL_LIMIT = "50GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"\.?([0-9a-f]{16})\.")
# What a set is called, by what its file is.
COMPLETE, UNFINISHED, OLD, DAMAGED = "complete", "unfinished", "old version", "damaged"


@dataclass(frozen=True)
class Kept:
    """What is kept of one set of images.

    Attributes:
        name: of its files.
        state: complete, unfinished, old version (it is not read any more), or damaged.
        dataset: folder or name of the data set; empty if unknown.
        split: of it.
        images: of the set; 0 if unknown.
        size: pixels per side; 0 if unknown.
        stored: bytes.
        used: when it was last used, in seconds of the clock.
    """

    name: str
    state: str
    dataset: str
    split: str
    images: int
    size: int
    stored: int
    used: float


def limit() -> int:
    """Return how many bytes may be kept: ``$DML_CACHE_LIMIT``, else 50 GB.

    Raises:
        UsageError: the variable is not a size.
    """
    return size_of(os.environ.get(LIMIT_VARIABLE) or _USUAL_LIMIT, LIMIT_VARIABLE)


def size_of(text: str, what: str) -> int:
    """Return a size in bytes that is written as 5GB, 1.5 TB, 800MB or 0.

    Args:
        text: the size.
        what: names it in errors.

    Raises:
        UsageError: it is not a size.
    """
    found = _SIZE.fullmatch(text)
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError(f"{what} is {text!r}; write a size, as 20GB, 500MB or 0")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def kept(folder: Path) -> tuple[list[Kept], int]:
    """Return the sets of images in a folder, least recently used first, and the bytes of all else.

    All else are small records, of statistics and of measured times.
    """
    files: dict[str, list[Path]] = {}
    others = 0
    for path in _entries(folder):
        named = _NAME.match(path.name)
        if named is not None and not path.name.endswith((".lock", ".copies.json")):
            files.setdefault(named[1], []).append(path)
        else:
            others += _stored(path)
    sets = []
    for name, paths in files.items():
        if any(path.name.endswith((".safetensors", PARTS, ".tmp")) for path in paths):
            sets.append(_describe(folder, name, paths))
        else:
            others += sum(map(_stored, paths))
    return sorted(sets, key=lambda one: (one.used, one.name)), others


def make_room(folder: Path, needed: int, most: int, spared: str = "") -> bool:
    """Remove what was not used for longest until so many bytes more may be kept.

    Args:
        folder: of the cache.
        needed: bytes.
        most: that may be kept.
        spared: the set that they are for; it does not count.

    Returns:
        Whether there is room: sets that another process uses stay.
    """
    sets, others = kept(folder)
    sets = [one for one in sets if one.name != spared]
    stored = others + sum(one.stored for one in sets)
    for one in sets:
        if stored + needed <= most:
            break
        if remove(folder, one.name):
            stored -= one.stored
    return stored + needed <= most


def remove(folder: Path, name: str) -> bool:
    """Remove a set of images; return whether it is gone: another process may use it."""
    path = folder / f"{name}.lock"
    try:
        with open_lock(path, wait=False) as state:
            if state is Lock.ANOTHERS:
                return False
            for found in _entries(folder):
                named = _NAME.match(found.name)
                if named is None or named[1] != name or found == path:
                    continue
                if found.is_dir():
                    shutil.rmtree(found)
                elif not found.name.endswith(".copies.json"):
                    found.unlink()
            path.unlink(missing_ok=True)  # while we hold it: see ``open_lock``
    except OSError:
        return False
    return True


def remove_records(folder: Path) -> None:
    """Remove records of statistics and of measured times; those that are needed are made again."""
    for path in _entries(folder):
        if path.suffix == ".json" and not _is_of_a_set(folder, path):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_of_a_set(folder: Path, path: Path) -> bool:
    named = _NAME.fullmatch(path.name.removesuffix("json"))
    return named is not None and (folder / f"{named[1]}.safetensors").exists()


@contextlib.contextmanager
def open_lock(path: Path, *, wait: bool) -> Iterator[Lock]:
    """Lock the file of a set; yield what became of it.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        with open(path, "a") as file:
            state, _ = lock(file, wait=wait)
            # A set may have been removed with its lock while we waited for that.
            if state is Lock.OURS and not _is_at(file, path):
                continue
            yield state
            return


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- what a file says


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _stored(path: Path) -> int:
    with contextlib.suppress(OSError):  # it may have just been removed
        if path.is_dir():
            return sum(map(_stored, path.iterdir()))
        return path.stat().st_size
    return 0


def _describe(folder: Path, name: str, paths: list[Path]) -> Kept:
    stored = sum(map(_stored, paths))
    images, parts = folder / f"{name}.safetensors", folder / f"{name}{PARTS}"
    state, about = UNFINISHED, {}
    times = [images.with_suffix(".json"), images]
    if images in paths:
        state, about = COMPLETE, _header(images)
        if not about:
            state = DAMAGED
        elif about.get("format") != str(FORMAT):
            state = OLD
    elif parts in paths:
        times = [parts]
        with contextlib.suppress(UnreadableError):
            about = read_json(parts / ABOUT)
    else:
        times = paths
    return Kept(
        name,
        state,
        str(about.get("dataset", "")),
        str(about.get("split", "")),
        _whole(about.get("images")),
        _whole(about.get("size")),
        stored,
        _time(times),
    )


def _header(path: Path) -> dict[str, Any]:
    """Return what a safetensors file says of itself; nothing if it is damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = parse_json(path, file.read(min(length, LARGEST_JSON)))
        shape = content["images"]["shape"]
        return {"images": shape[0], "size": shape[1], **content.get("__metadata__", {})}
    except (OSError, UnreadableError, ValueError, KeyError, TypeError, IndexError):
        return {}


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _time(paths: list[Path]) -> float:
    """Return the time of the first of some files that is there."""
    for path in paths:
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0
