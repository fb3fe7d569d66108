"""Whether a folder holds class folders, and which of its folders are the splits.

Split and class follow from where a folder lies, never from words in a name: a class may be called
"train".
"""

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.data.image_files import folders_in, has_image, is_passed, kind_of
from dml_accel.data.pixels import endings

HERE = "."  # as a split: the folder of the data set itself
VALIDATION = ("val", "validation", "valid")  # what --val-split auto takes
_TABLES = (".parquet", ".arrow", ".tar")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_NAMED = 5


@dataclass(frozen=True)
class Layout:
    """The splits of a folder of class folders.

    Attributes:
        root: the folder.
        splits: their names, by role (train, test, and val if there is one); a name is a path below
            ``root``, or ``HERE``.
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
        roles: those that are needed; ``train`` may be missing if only ``test`` is, and of ``val``
            there may be none.

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
    seen = "val" in roles or data.test_fraction  # beside a split that is to be cut
    val = _val_split(root, data, asked, folders) if seen else None
    if data.test_fraction:
        only = _only_split(root, data, asked["train"], val, folders, is_split)
        splits = {"train": only, "test": only}
        if val:
            refuse_overlap(root, {"train": only, "val": val})
        if val and "val" in roles:
            splits["val"] = val
        return Layout(root, splits, data.test_fraction)
    for role in roles:
        if role != "val" and not is_split[role]:
            _refuse_missing(root, role, asked[role], folders, any(is_split.values()), roles)
    splits = {role: name for role, name in asked.items() if is_split[role]}
    if val:
        splits["val"] = val
    if "train" in roles:
        refuse_overlap(root, splits)
    tops = {Path(name).parts[0] for name in splits.values() if name != HERE}
    unused = [name for name in folders if name not in tops and _may_have_images(root / name)]
    # Where only a split to report on is read, others have their use elsewhere.
    unused = unused if tops and "train" in roles else []
    return Layout(root, splits, 0.0, tuple(unused))


def _val_split(
    root: Path, data: DataConfig, asked: Mapping[str, str], folders: Sequence[str]
) -> str | None:
    """Return the split to choose a peer or an epoch by; None for none."""
    if data.val_split == "none":
        return None
    if data.val_split != "auto":
        if not _is_split(root, data.val_split):
            found = [name for name in folders if _may_have_images(root / name)]
            raise UsageError(
                f"the data set has no split {data.val_split!r} (it has: {quoted(found, False)}); "
                "choose one with --val-split, or write --val-split none"
            )
        return os.path.normpath(data.val_split)
    if data.val_fraction or data.test_fraction:
        return None
    taken = [(root / name).resolve() for name in asked.values()]
    for name in VALIDATION:
        if name in folders and (root / name).resolve() not in taken and _is_split(root, name):
            return name
    return None


def _only_split(
    root: Path,
    data: DataConfig,
    train: str,
    val: str | None,
    folders: list[str],
    is_split: Mapping[str, bool],
) -> str:
    """Return the split that a test split is to be cut from."""
    if train == HERE or not is_split["train"]:
        return HERE
    others = [
        name for name in folders if name not in (train, val) and _may_have_images(root / name)
    ]
    if is_split["test"]:
        raise UsageError(
            f"--dataset {root} has a split {data.test_split!r} already: drop --test-fraction "
            f"{data.test_fraction:g}, or name the folder of one split"
        )
    if others:
        also = [name for name in others if name in VALIDATION][:1]
        raise UsageError(
            f"--dataset {root}: is {train!r} a split, or a class like "
            f"{quoted(others)}? Write --train-split {HERE} if all folders are classes, or name "
            f"{root / train} itself as the data set"
            + "".join(f", or add --val-split {name} to choose a peer by it" for name in also)
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
            f"--dataset {root} has no split {name!r} (it has: {quoted(found, False)}): {said}"
        )
    if other:
        validation = [one for one in VALIDATION if one in found and role == "test"][:1]
        fraction = " ".join(["--test-fraction 0.2", *(f"--val-split {one}" for one in validation)])
        raise UsageError(
            f"the data set has no split {name!r} (it has: {quoted(found, quotes=False)}); choose "
            f"one with {' '.join([f'--{role}-split', *validation])}, or hold out a fifth of each "
            f"class with {fraction}"
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
        f"--dataset {root} has {lacks}: if its folders ({quoted(found)}) are the "
        "classes, --test-fraction 0.2 holds out a fifth of each for testing; else arrange it as "
        "train/<class>/*.jpg and test/<class>/*.jpg"
    )


def refuse_overlap(root: Path, splits: Mapping[str, str]) -> None:
    """Refuse splits that share a folder: no image may be in two of them.

    Raises:
        UsageError: one of the folders, by role, lies in another.
    """
    words = {"train": "training", "val": "validation", "test": "test"}
    for one, other in itertools.combinations(splits, 2):
        first, second = ((root / splits[role]).resolve() for role in (one, other))
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise UsageError(
                f"--dataset {root}: the splits {splits[one]!r} and {splits[other]!r} share the "
                f"folder {max(first, second, key=lambda path: len(path.parts))}: {words[other]} "
                f"images must not be {words[one]} images"
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
    files = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    return any(lists_images(root / name / file) for name in ("", *folders) for file in files)


def lists_images(path: Path) -> bool:
    """Whether a metadata file names images; other programs have files of such names as well."""
    if path.suffix == ".parquet":
        return path.is_file()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return b"file_name" in file.readline(2**16)
    return False


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


def quoted(names: Sequence[str], quotes: bool = True) -> str:
    """Return the first few names for a message."""
    some = [repr(printable(name)) if quotes else printable(name) for name in names[:_NAMED]]
    return ", ".join(some) + ", ..." * (len(names) > _NAMED)
