"""A test split that is cut from a single one, by the names of its images alone."""

import contextlib
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dml_accel.core.errors import UnreadableError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.host import cache_dir
from dml_accel.core.rng import key
from dml_accel.data.listing import StoredFiles, file_digest


def held_out(
    name: Callable[[int], str], labels: np.ndarray, fraction: float, first: np.ndarray
) -> np.ndarray:
    """Return which images are for testing, [N] bool.

    Each image falls on a side by its name alone, so that images that are added move no other.
    Copies of an image lie on its side. In a class with several images each side has one, which may
    move back when images are added.

    Args:
        name: returns the name of an image.
        labels: [N] int64.
        fraction: share of each class that is for testing.
        first: the image that each is a copy of, or itself, [N] int64.
    """
    places = np.ones(len(labels))
    own = first == np.arange(len(labels))
    for row in own.nonzero()[0].tolist():
        places[row] = key("test split", unicodedata.normalize("NFC", name(row))) / 2**63
    tested = own & (places < fraction)
    by_class = np.argsort(labels, kind="stable")
    for same in np.split(by_class, np.diff(labels[by_class]).nonzero()[0] + 1):
        rows = same[own[same]]
        if len(rows) > 1:  # with very few images, chance may leave a side empty
            if not tested[rows].any():
                tested[rows[places[rows].argmin()]] = True
            if tested[rows].all():
                tested[rows[places[rows].argmax()]] = False
    return np.asarray(tested[first])


def first_copies(root: Path, files: StoredFiles) -> np.ndarray:
    """Return for every image the row with its shortest path, [N] int64: copies have several paths.

    What was found is kept beside the decoded images, because it takes reading the files.
    """
    cache = cache_dir()
    about = key("copies", os.path.realpath(root), files.digest())
    kept = cache and cache / f"{about:016x}.copies.json"
    first = np.arange(len(files))
    if kept:
        with contextlib.suppress(UnreadableError, ValueError, TypeError, IndexError):
            before = read_json(kept)
            first[[int(row) for row in before]] = list(before.values())
            return first
    _, places, counts = np.unique(files.sizes, return_inverse=True, return_counts=True)
    groups: dict[bytes, list[int]] = {}
    for row in (counts[places] > 1).nonzero()[0].tolist():
        groups.setdefault(file_digest(root / files.path(row)), []).append(row)
    for rows in groups.values():
        # A copy has mostly a longer name than the image, such as "cat (1).jpg".
        first[rows] = min(rows, key=lambda row: (len(files.path(row)), files.path(row)))
    if kept:
        copies = (first != np.arange(len(files))).nonzero()[0].tolist()
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {str(row): int(first[row]) for row in copies})
    return first
