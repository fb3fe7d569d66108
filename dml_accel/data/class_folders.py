"""Folders of images whose names are the classes: ``<split>/<class>/**``, or ``<class>/**``.

Split and class follow from where a folder lies, never from words in a name: a class may be called
"train". Links are followed. What lies beside images is passed over, and counted.

    find_layout   whether a folder holds class folders, and which of them are the splits
    read_folders  the images of each split, and what was left out
"""

import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.data.holdout import first_copies, held_out
from dml_accel.data.image_files import (
    ending_of,
    files_below,
    folders_in,
    has_image,
    identity_of,
    is_image,
    is_passed,
    kind_of,
)
from dml_accel.data.listing import Listing, StoredFiles, file_digest
from dml_accel.data.pixels import endings

HERE = "."  # as a split: the folder of the data set itself
_TABLES = (".parquet", ".arrow")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_NAMED = 5


# ---------------------------------------------------------------- the layout


@dataclass(frozen=True)
class Layout:
    """The splits of a folder of class folders.

    Attributes:
        root: the folder.
        splits: their names, by role (train, test); a name is a path below ``root``, or ``HERE``.
        test_fraction: share of the images of the only split that are for testing; 0 without.
        unused: names of folders beside the splits.
    """

    root: Path
    splits: Mapping[str, str]
    test_fraction: float
    unused: tuple[str, ...] = ()


def find_layout(root: Path, data: DataConfig, roles: Sequence[str]) -> Layout | None:
    """Return the splits of a folder of class folders; None if it is not one.

    Args:
        root: an existing folder.
        data: names of the splits, and the test fraction.
        roles: those that are needed; ``train`` may be missing if only ``test`` is.

    Raises:
        UsageError: the folder lacks a split, or it is not clear which folders are splits.
    """
    folders = folders_in(root)
    if _is_table(root, folders):
        return None
    names = {"train": data.train_split, "test": data.test_split}
    asked = {role: os.path.normpath(name) if name else "" for role, name in names.items()}
    is_split = {role: _is_split(root, name) for role, name in asked.items()}
    if not any(is_split.values()):
        if _holds_tables(root, folders) or not any(has_image(root / name) for name in folders):
            _refuse_archives(root, folders)
            if not _holds_tables(root, folders):
                _refuse_without_classes(root)
            return None
        if HERE in asked.values():
            is_split = {role: name == HERE for role, name in asked.items()}
    if data.test_fraction:
        only = _only_split(root, data, asked["train"], folders, is_split)
        return Layout(root, {"train": only, "test": only}, data.test_fraction)
    for role in roles:
        if not is_split[role]:
            _refuse_missing(root, role, asked[role], folders, any(is_split.values()), roles)
    if "train" in roles:
        _refuse_overlap(root, asked)
    splits = {role: name for role, name in asked.items() if is_split[role]}
    tops = {Path(name).parts[0] for name in splits.values() if name != HERE}
    unused = [name for name in folders if name not in tops and _may_have_images(root / name)]
    unused = unused if tops else []
    return Layout(root, splits, 0.0, tuple(unused))


def _only_split(
    root: Path, data: DataConfig, train: str, folders: list[str], is_split: Mapping[str, bool]
) -> str:
    """Return the split that a test split is to be cut from."""
    if train == HERE or not is_split["train"]:
        return HERE
    others = [name for name in folders if name != train and _may_have_images(root / name)]
    if is_split["test"]:
        raise UsageError(
            f"--dataset {root} has a split {data.test_split!r} already: drop --test-fraction "
            f"{data.test_fraction:g}, or name the folder of one split"
        )
    if others:
        raise UsageError(
            f"--dataset {root}: is {train!r} a split, or a class like "
            f"{_listed(others)}? Write --train-split {HERE} if all folders are classes, or name "
            f"{root / train} itself as the data set"
        )
    return train


def _may_have_images(folder: Path) -> bool:
    """Whether a folder that is not read has images, as far as it can be read."""
    try:
        return has_image(folder)
    except UsageError:
        return False


def _refuse_missing(
    root: Path, role: str, name: str, folders: list[str], other: bool, roles: Sequence[str]
) -> NoReturn:
    found = [folder for folder in folders if _may_have_images(root / folder)]
    if "train" not in roles:
        said = "choose another with --test-split" + f" ({HERE} is all of it)" * (not other)
        raise UsageError(
            f"--dataset {root} has no split {name!r} (it has: {_listed(found, False)}): {said}"
        )
    if other:
        raise UsageError(
            f"the data set has no split {name!r} (it has: {_listed(found, quotes=False)}); choose "
            f"one with --{role}-split, or hold out a fifth of each class with --test-fraction 0.2"
        )
    for folder in found:
        if any(_is_split(root / folder, one) for one in ("train", name)):
            raise UsageError(f"--dataset {root} has its splits in {root / folder}: name that")
    for folder in found:
        if folder != name and folder.lower() == name.lower():
            raise UsageError(
                f"--dataset {root} has no folder {name!r}, but {folder!r}: name it with "
                f"--{role}-split {folder}"
            )
    lacks = f"no folder {name!r}"
    if name in found:
        lacks = f"images, not class folders, in {name!r}"
    raise UsageError(
        f"--dataset {root} has {lacks}: if its folders ({_listed(found)}) are the "
        "classes, --test-fraction 0.2 holds out a fifth of each for testing; else arrange it as "
        "train/<class>/*.jpg and test/<class>/*.jpg"
    )


def _refuse_overlap(root: Path, asked: Mapping[str, str]) -> None:
    """Refuse splits that share a folder: test images must not be training images."""
    train, test = ((root / asked[role]).resolve() for role in ("train", "test"))
    if train.is_relative_to(test) or test.is_relative_to(train):
        raise UsageError(
            f"--dataset {root}: the splits {asked['train']!r} and {asked['test']!r} share the "
            f"folder {max(train, test, key=lambda path: len(path.parts))}: test images must not be "
            "training images"
        )


def _is_split(root: Path, name: str) -> bool:
    """Whether a folder of this name holds class folders with images."""
    if name == HERE or not name:
        return False
    inside = Path(name)
    if inside.is_absolute() or ".." in inside.parts:
        return False
    folder = root / inside
    return folder.is_dir() and any(has_image(folder / label) for label in folders_in(folder))


def _is_table(root: Path, folders: Sequence[str]) -> bool:
    """Whether a folder was saved by the datasets library, or lists its images in a table."""
    if (root / "dataset_dict.json").is_file():
        return True
    if (root / "dataset_info.json").is_file() and (root / "state.json").is_file():
        return True
    return any(_lists_images(root / name) for name in ("", *folders))


def _lists_images(folder: Path) -> bool:
    for name in ("metadata.csv", "metadata.jsonl"):
        with contextlib.suppress(OSError), open(folder / name, "rb") as file:
            if b"file_name" in file.readline(2**16):
                return True
    return (folder / "metadata.parquet").is_file()


def _holds_tables(root: Path, folders: Sequence[str]) -> bool:
    """Whether a folder, or one in it, holds tables and no images beside them."""
    for folder in (root, *(root / name for name in folders)):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            ends = {Path(entry.name).suffix.lower() for entry in entries if entry.is_file()}
            if ends & set(_TABLES) and not ends & endings():
                return True
    return False


def _refuse_archives(root: Path, folders: Sequence[str]) -> None:
    """Say what to do with a folder of archives, which holds nothing that could be read."""
    found = [
        path
        for folder in (root, *(root / name for name in folders))
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".zip", ".7z", ".rar")
    ]
    if found and not _holds_tables(root, folders):
        some = ", ".join(map(str, found[:_NAMED])) + ", ..." * (len(found) > _NAMED)
        raise UsageError(
            f"--dataset {root} holds archives: unpack {some}, so that the images lie in "
            "train/<class>/ and test/<class>/"
        )


def _refuse_without_classes(root: Path) -> None:
    """Say what is missing in a folder that holds nothing, or images alone."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not is_passed(entry.name)]
    if not names:
        raise UsageError(f"--dataset {root} is empty")
    if any(kind_of(name) == "image" for name in names):
        raise UsageError(
            f"--dataset {root} holds images, but no folders that name their classes: arrange it as "
            "<class>/*.jpg, or as train/<class>/*.jpg and test/<class>/*.jpg"
        )


def is_archive(path: Path) -> bool:
    """Whether a file is an archive by its ending."""
    return path.suffix.lower() in _ARCHIVES


def _listed(names: Sequence[str], quotes: bool = True) -> str:
    some = [repr(printable(name)) if quotes else printable(name) for name in names[:_NAMED]]
    return ", ".join(some) + ", ..." * (len(names) > _NAMED)


# ---------------------------------------------------------------- the images


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
            found.append(f"warning: no image that can be read in {_listed(self.empty)}")
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
        sides = {
            role: (images.take(rows), labels[rows])
            for role, rows in (("train", (~tested).nonzero()[0]), ("test", tested.nonzero()[0]))
        }
    lines = left_out.lines()
    if layout.unused:
        lines.append(f"folders beside the splits are not used: {_listed(layout.unused)}")
    listings = {}
    for role, (images, labels) in sides.items():
        name = layout.splits[role]
        if not images:
            raise UsageError(f"split {name!r} of {layout.root} has no images for {role}ing")
        title = role if layout.test_fraction else name
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
