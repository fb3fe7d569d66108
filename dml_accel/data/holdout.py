"""A test split that is cut from a single one, by the paths of its images alone."""

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dml_accel.core.errors import UnreadableError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.host import cache_dir
from dml_accel.core.rng import key
from dml_accel.data.listing import StoredFile, file_digest


def held_out(root: Path, images: Mapping[StoredFile, str], fraction: float) -> set[str]:
    """Return the paths of the images that are for testing.

    Each image falls on a side by its path alone, so that images that are added move no other.
    Copies and links of an image lie on its side: that of their shortest path. In a class with
    several images each side has one, which may move back when images are added.
    """
    first = _copies(root, list(images))
    labels = {file.path: label for file, label in images.items()}
    by_class: dict[str, list[tuple[float, str]]] = {}
    for path in sorted({first.get(path, path) for path in labels}):
        place = key("test split", unicodedata.normalize("NFC", path)) / 2**63
        by_class.setdefault(labels[path], []).append((place, path))
    tested: set[str] = set()
    for places in by_class.values():
        places.sort()
        chosen = [path for place, path in places if place < fraction]
        if len(places) > 1:  # with very few images, chance may leave a side empty
            chosen = chosen or [places[0][1]]
            chosen = chosen if len(chosen) < len(places) else chosen[:-1]
        tested.update(chosen)
    return {path for path in labels if first.get(path, path) in tested}


def _copies(root: Path, files: Sequence[StoredFile]) -> dict[str, str]:
    """Return the shortest path of every image that lies in several places, by each of its paths.

    What was found is kept beside the decoded images, because it takes reading the files.
    """
    names = tuple((file.name, file.state) for file in files)
    cache = cache_dir()
    kept = cache and cache / f"{key('copies', os.path.realpath(root), names):016x}.copies.json"
    if kept:
        with contextlib.suppress(UnreadableError, ValueError, TypeError, KeyError):
            before = read_json(kept)
            return {files[int(row)].path: files[first].path for row, first in before.items()}
    sizes = Counter(file.size for file in files)
    groups: dict[bytes, list[int]] = {}
    for row, file in enumerate(files):
        if sizes[file.size] > 1:
            groups.setdefault(file_digest(root / file.path), []).append(row)
    # A copy has mostly a longer name than the image, such as "cat (1).jpg".
    found = {
        row: min(rows, key=lambda one: (len(files[one].path), files[one].path))
        for rows in groups.values()
        if len(rows) > 1
        for row in rows
    }
    if kept:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {str(row): first for row, first in found.items()})
    return {files[row].path: files[first].path for row, first in found.items()}
