"""The images of class folders: ``<split>/<class>/**``, or ``<class>/**``.

Links are followed. What lies beside images is passed over, and counted.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.data.class_layout import HERE, Layout, quoted
from dml_accel.data.holdout import first_copies, held_out
from dml_accel.data.image_files import (
    ending_of,
    files_below,
    folders_in,
    identity_of,
    is_image,
    is_passed,
    kind_of,
)
from dml_accel.data.listing import Listing, StoredFiles, file_digest


@dataclass(frozen=True)
class FolderListing(Listing):
    """The images of a split of class folders.

    Attributes:
        root: the folder that paths are relative to.
        images: one file per row.
    """

    root: Path
    images: StoredFiles

    def content(self, row: int) -> bytes:
        """Return the bytes of an image file."""
        return (self.root / self.images.path(row)).read_bytes()

    def place(self, row: int) -> str:
        """Return the path of an image file."""
        return str(self.root / self.images.path(row))

    def files(self, rows: Sequence[int]) -> StoredFiles:
        """Return the image files of some rows."""
        return self.images.take(rows)

    def digest(self, rows: Sequence[int], contents: Sequence[bytes] | None) -> str:
        """Return the sha256 of the contents' sha256."""
        known = contents or (file_digest(self.root / self.images.path(row)) for row in rows)
        return hashlib.sha256(b"".join(known)).hexdigest()

    def names(self, rows: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield the path below ``root`` and the bytes of each image file."""
        return ((self.images.path(row), int(self.images.sizes[row])) for row in rows)


@dataclass
class LeftOut:
    """Files that are not read, counted by where they lie and their ending.

    Attributes:
        unreadable: by (folder, ending): they are no images that can be read.
        beside: by ending: texts that lie beside images.
        classless: by split: images that lie in no class folder.
        empty: class folders without any image, as split/class.
    """

    unreadable: Counter[tuple[str, str]] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    classless: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return in words what was left out, one line per kind."""
        found = [
            f"warning: {_files_of(count)} of {printable(place)} cannot be read ({ending})"
            for (place, ending), count in sorted(self.unreadable.items())
        ]
        found += [
            f"warning: {_files_of(count)} of {printable(split)} left out, in no class folder"
            for split, count in sorted(self.classless.items())
        ]
        if self.empty:
            found.append(f"warning: no image that can be read in {quoted(self.empty)}")
        if self.beside:
            kinds = ", ".join(f"{count:,} {end}" for end, count in sorted(self.beside.items()))
            found.append(f"passed over beside the images: {kinds}")
        return found


def _files_of(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def read_folders(
    layout: Layout,
) -> tuple[dict[str, FolderListing], tuple[str, ...], list[str]]:
    """List the images of every split, in the order of their paths.

    Returns:
        The listings by role, the class names in label order, and what was left out, in words.

    Raises:
        UsageError: a folder cannot be read, a link leads to a folder above it, or a split has no
            images.
    """
    left_out = LeftOut()
    names = dict.fromkeys(layout.splits.values())
    found = {name: _read_split(layout.root, name, left_out) for name in names}
    classes = tuple(sorted({label for split in found.values() for label, _ in split}))
    places = {label: place for place, label in enumerate(classes)}
    read = {name: _joined(split, places) for name, split in found.items()}
    sides = {role: read[name] for role, name in layout.splits.items()}
    if layout.test_fraction:
        images, labels = sides["train"]
        tested = held_out(
            images.path, labels, layout.test_fraction, first_copies(layout.root, images)
        )
        for role, rows in (("train", (~tested).nonzero()[0]), ("test", tested.nonzero()[0])):
            sides[role] = images.take(rows), labels[rows]
    lines = left_out.lines()
    if layout.unused:
        lines.append(f"folders beside the splits are not used: {quoted(layout.unused)}")
    listings = {}
    for role, (images, labels) in sides.items():
        name = layout.splits[role]
        if not images:
            words = {"train": "training", "val": "validation", "test": "testing"}
            raise UsageError(f"split {name!r} of {layout.root} has no images for {words[role]}")
        title = role if layout.test_fraction and role != "val" else name
        where = (os.path.realpath(layout.root),)
        listings[role] = FolderListing(title, torch.from_numpy(labels), where, layout.root, images)
    return listings, classes, lines


def _joined(
    split: Sequence[tuple[str, StoredFiles]], places: Mapping[str, int]
) -> tuple[StoredFiles, np.ndarray]:
    """Return the images of all classes of a split, and their labels, [N] int64."""
    labels = np.array([places[label] for label, _ in split], np.int64)
    sizes = np.array([len(images) for _, images in split], np.int64)
    return StoredFiles.joined([images for _, images in split]), labels.repeat(sizes)


def _read_split(root: Path, split: str, left_out: LeftOut) -> list[tuple[str, StoredFiles]]:
    """Return the classes of a split with the images of each, in the order of their paths."""
    top = root if split == HERE else root / split
    prefix = "" if split == HERE else f"{split}/"
    found: list[tuple[str, StoredFiles]] = []
    above = (identity_of(root), identity_of(top))
    for label in sorted(folders_in(top), key=lambda name: f"{name}/"):
        place = f"{prefix}{label}"
        images = StoredFiles.of(_images_in(root, top / label, place, above, left_out))
        if images:
            # A name has several spellings in Unicode, and file systems choose differently.
            found.append((unicodedata.normalize("NFC", label), images))
        else:
            left_out.empty.append(place)
    with os.scandir(top) as entries:
        loose = [e.name for e in entries if not is_passed(e.name) and e.is_file()]
    left_out.classless[split] += sum(kind_of(name) == "image" for name in loose)
    left_out.classless += Counter()  # drops what is zero
    return found


def _images_in(
    root: Path, folder: Path, place: str, above: tuple[tuple[int, int], ...], left_out: LeftOut
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the images of a class by their path below ``root``, and count what else there is."""
    for path, stat in files_below(folder, place, above):
        kind = "unreadable" if stat is None else kind_of(path)
        if kind == "unknown":
            kind = "image" if is_image(root / path) else "unreadable"
        if kind == "image" and stat is not None:
            yield path, stat
        elif kind == "beside":
            left_out.beside[ending_of(path)] += 1
        else:
            left_out.unreadable[place, ending_of(path) if stat else "a broken link"] += 1
