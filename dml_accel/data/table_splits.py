"""The splits of a data set that the datasets library opens, as listings of their images."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.data.arrow import Opened, known_split, open_tables
from dml_accel.data.class_layout import VALIDATION
from dml_accel.data.columns import classes_of, image_column, label_column, labels_of
from dml_accel.data.holdout import held_out
from dml_accel.data.listing import Listing, StoredFiles, file_digest

_AT_ONCE = 10_000  # rows


@dataclass(frozen=True)
class TableListing(Listing):
    """The images of a split in a table of the datasets library.

    Attributes:
        records: the column of images, not decoded.
        column: its name.
        roots: folders that must contain every file that a row names; rows are untrusted.
        stored_in: the files that hold the table, or that it was made from.
        places: our rows of the table, [N] int64; None for all.
    """

    records: Any
    column: str
    roots: Sequence[Path]
    stored_in: StoredFiles
    places: np.ndarray | None = None

    def _place(self, row: int) -> int:
        return row if self.places is None else int(self.places[row])

    def content(self, row: int) -> bytes:
        """Return the stored bytes of an image.

        Raises:
            ValueError, OSError: the row is empty, or names a file outside the data set.
        """
        stored = self.records[self._place(row)][self.column] or {}
        content, path = stored.get("bytes"), stored.get("path")
        if content is not None:
            return bytes(content)
        if path is None:
            raise ValueError("the row is empty")
        if not any(_is_inside(path, root) for root in self.roots):
            raise ValueError(
                "the row names a file outside the data set: save images and not their names, with "
                "save_to_disk for instance"
            )
        return Path(path).read_bytes()

    def place(self, row: int) -> str:
        """Return the row, and the file that it names."""
        place = self._place(row)
        path = (self.records[place][self.column] or {}).get("path")
        # A split that was cut has another name than its table, whose rows are meant.
        return f"image {place} of split {self.key[1]!r}" + (f" ({path})" if path else "")

    def files(self, rows: Sequence[int]) -> StoredFiles:
        """Return the files of the table, whichever rows are asked for."""
        return self.stored_in

    def digest(self, rows: Sequence[int], contents: Sequence[bytes] | None) -> str:
        """Return the sha256 of the sha256 of those files."""
        return hashlib.sha256(b"".join(file_digest(one.path) for one in self.stored_in)).hexdigest()

    def names(self, rows: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield the file name that each row has, and the bytes of its image, -1 for none."""
        import pyarrow.compute as pc

        for start in range(0, len(rows), _AT_ONCE):
            places = [self._place(row) for row in rows[start : start + _AT_ONCE]]
            some = self.records.select(places).with_format("arrow")
            stored = some[:][self.column].combine_chunks()
            sizes = pc.binary_length(stored.field("bytes")).to_pylist()
            for path, size in zip(stored.field("path").to_pylist(), sizes, strict=True):
                if size is None and path is not None:
                    with contextlib.suppress(OSError):
                        size = os.stat(path).st_size
                yield self._name(path), -1 if size is None else size

    def file_names(self) -> Any:
        """Return the file name of every row as an Arrow array; None unless each has its own."""
        import pyarrow as pa
        import pyarrow.compute as pc

        parts = []
        for start in range(0, len(self.labels), _AT_ONCE):
            some = self.records.select(range(start, min(start + _AT_ONCE, len(self.labels))))
            stored = some.with_format("arrow")[:][self.column].combine_chunks()
            parts.append([self._name(path) for path in stored.field("path").to_pylist()])
        names = pa.chunked_array([pa.array(part, pa.string()) for part in parts])
        differ = len(names) == pc.count_distinct(names).as_py()
        return names.combine_chunks() if differ and pc.index(names, "").as_py() < 0 else None

    def _name(self, path: str | None) -> str:
        """Return the path of a row below its data set, wherever that lies."""
        if path is None or not os.path.isabs(path):
            return path or ""
        for root in self.roots:
            if Path(path).is_relative_to(root):
                return str(Path(path).relative_to(root))
        return os.path.basename(path)


def _is_inside(path: str, root: Path) -> bool:
    """Whether a path lies in a folder; a link in the folder may still lead elsewhere."""
    # By name, or by what both names lead to: the folder itself may be reached through a link.
    by_name = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))
    return by_name or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def list_tables(
    data: DataConfig, folder: Path | None, roles: Sequence[str], quiet: bool
) -> tuple[dict[str, TableListing], tuple[str, ...]]:
    """Open a data set and list the images of its splits.

    Args:
        data: its name, splits and columns.
        folder: the local folder that the name stands for; None for the hub.
        roles: of the splits that are needed: train, test, val; there may be no split val.
        quiet: show no progress.

    Returns:
        The listings by role, and the class names in label order.

    Raises:
        UsageError: see ``open_tables``; or a split, column or label cannot be used.
    """
    opened = open_tables(data, folder, quiet)
    names = _names(opened.splits, data, roles)
    tables = {role: opened.splits[name] for role, name in names.items()}
    reference = tables["train" if "train" in tables else "test"]
    image = image_column(reference.features, data.image_column)
    label = label_column(reference.features, data.label_column)
    for role, table in tables.items():
        kinds, others = reference.features, table.features
        if others.get(image) != kinds[image] or others.get(label) != kinds[label]:
            raise UsageError(
                f"columns {image!r} and {label!r} of split {names[role]!r} differ from those of "
                f"{data.train_split!r}: all splits need the same image column and classes"
            )
    classes = classes_of(reference, label, opened.by_number)
    if len(classes) < 2:
        raise UsageError(
            f"column {label!r} has {len(classes)} distinct class; at least 2 are needed"
        )
    listed = {}
    for role, name in names.items():
        if role in roles and name not in listed:
            listed[name] = _listing(data, opened, name, image, label, classes)
    if data.test_fraction:
        train, test = _cut(data, listed[names["train"]])
        sides = {"train": train, "test": test}
        return {role: sides.get(role) or listed[names[role]] for role in names}, classes
    return {role: listed[name] for role, name in names.items()}, classes


def _names(splits: Mapping[str, Any], data: DataConfig, roles: Sequence[str]) -> dict[str, str]:
    """Return the names of the splits that are needed, by role.

    Raises:
        UsageError: a split is missing, empty, or asked for twice.
    """
    if data.test_fraction:
        found = _names_to_cut(splits, data)
    else:
        asked = {"train": data.train_split, "test": data.test_split}
        found = {role: _known(splits, asked[role], role) for role in roles if role != "val"}
        val = _validation(splits, data, found) if "val" in roles else None
        found |= {"val": val} if val else {}
        for one, other in itertools.combinations(found, 2):
            if found[one] == found[other]:
                raise UsageError(
                    f"--{one}-split and --{other}-split are both {found[one]!r}: no image may be "
                    "in two splits; name different ones"
                )
    for role, name in found.items():
        if len(splits[name]) == 0:
            raise UsageError(f"split {name!r} has no images; choose another with --{role}-split")
    return found


def _names_to_cut(splits: Mapping[str, Any], data: DataConfig) -> dict[str, str]:
    """Return the split that is cut in two, as ``train`` and ``test``, and a named ``val``."""
    fraction = f"--test-fraction {data.test_fraction:g}"
    if known_split(splits, data.test_split):
        raise UsageError(
            f"--dataset {data.dataset} has a split {data.test_split!r} already: drop {fraction}"
        )
    only = known_split(splits, data.train_split)
    if only is None and data.train_split == DataConfig.train_split and len(splits) == 1:
        (only,) = splits
    only = only or _known(splits, data.train_split, "train")
    found = {"train": only, "test": only}
    if data.val_split not in ("auto", "none"):
        found["val"] = _known(splits, data.val_split, "val")
        if found["val"] == only:
            raise UsageError(
                f"--val-split {data.val_split} is the split that {fraction} cuts: name another"
            )
    others = [name for name in splits if name not in found.values()]
    if others and data.val_split != "none":
        raise UsageError(
            f"--dataset {data.dataset} has other splits beside {only!r} ({', '.join(others)}): "
            f"report on one with --test-split instead of {fraction}, choose a peer by one with "
            "--val-split, or leave them out with --val-split none"
        )
    return found


def _validation(
    splits: Mapping[str, Any], data: DataConfig, taken: Mapping[str, str]
) -> str | None:
    if data.val_split == "none":
        return None
    if data.val_split != "auto":
        return _known(splits, data.val_split, "val")
    if data.val_fraction:
        return None
    found = (name for name in VALIDATION if name in splits and name not in taken.values())
    return next((name for name in found if len(splits[name])), None)


def _known(splits: Mapping[str, Any], name: str, role: str) -> str:
    found = known_split(splits, name)
    if found is not None:
        return found
    ways = [f"choose one with --{role}-split"]
    if role == "test":
        validation = [one for one in VALIDATION if one in splits][:1]
        ways = [" ".join([*ways, *validation]), "hold out a fifth of each class with "]
        ways[1] += " ".join(["--test-fraction 0.2", *(f"--val-split {one}" for one in validation)])
    raise UsageError(
        f"the data set has no split {name!r} (it has: {', '.join(splits)}); {', or '.join(ways)}"
    )


def _listing(
    data: DataConfig,
    opened: Opened,
    name: str,
    image: str,
    label: str,
    classes: Sequence[str],
) -> TableListing:
    import datasets  # is there: opening has required it

    table = opened.splits[name]
    by_value = not hasattr(table.features[label], "names")
    labels = labels_of(table, name, label, classes, by_value)
    records = table.select_columns(image).cast_column(image, datasets.Image(decode=False))
    paths = [file["filename"] for file in table.cache_files]
    # A table of the hub that the library keeps in memory has no files, and is not cached by ours.
    files = opened.files
    if files is None:
        files = StoredFiles.of((path, os.stat(path)) for path in paths)
    # What a table of another configuration holds is another thing, in the same files.
    about = (data.dataset_config, name, image)
    return TableListing(name, labels, about, records, image, opened.roots, files)


def _cut(data: DataConfig, whole: TableListing) -> tuple[TableListing, TableListing]:
    """Return the images for training and those for testing, by their file names or rows."""
    names = whole.file_names()
    tested = held_out(
        lambda row: str(row) if names is None else names[row].as_py(),
        whole.labels.numpy(),
        data.test_fraction,
        np.arange(len(whole.labels)),
    )
    sides = []
    for role, rows in (("train", (~tested).nonzero()[0]), ("test", tested.nonzero()[0])):
        if not len(rows):
            raise UsageError(
                f"--test-fraction {data.test_fraction:g} leaves no images of split "
                f"{whole.split!r} for {role}ing"
            )
        about = (*whole.key, role, data.test_fraction)
        labels = whole.labels[torch.from_numpy(rows)]
        sides.append(dataclasses.replace(whole, split=role, labels=labels, key=about, places=rows))
    return sides[0], sides[1]
