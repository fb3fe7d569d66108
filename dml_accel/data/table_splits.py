"""The splits of a data set that the datasets library opens, as listings of their images."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.data.arrow import kept_tables, open_tables
from dml_accel.data.columns import classes_of, image_column, label_column, labels_of
from dml_accel.data.listing import Listing, StoredFile, file_digest

_AT_ONCE = 10_000  # rows


@dataclass(frozen=True)
class TableListing(Listing):
    """The images of a split in a table of the datasets library.

    Attributes:
        records: the column of images, not decoded.
        column: its name.
        roots: folders that must contain every file that a row names; rows are untrusted.
        stored_in: the files that hold the table, or that it was made from.
    """

    records: Any
    column: str
    roots: Sequence[Path]
    stored_in: Sequence[StoredFile]

    def content(self, row: int) -> bytes:
        """Return the stored bytes of an image.

        Raises:
            ValueError, OSError: the row is empty, or names a file outside the data set.
        """
        stored = self.records[row][self.column] or {}
        content, path = stored.get("bytes"), stored.get("path")
        if content is not None:
            return bytes(content)
        if path is None:
            raise ValueError("the row is empty")
        if not any(_is_inside(path, root) for root in self.roots):
            raise ValueError("the row names a file outside the data set")
        return Path(path).read_bytes()

    def place(self, row: int) -> str:
        """Return the row, and the file that it names."""
        stored = self.records[row][self.column] or {}
        path = stored.get("path")
        return f"image {row} of split {self.split!r}" + (f" ({path})" if path else "")

    def files(self, rows: Sequence[int]) -> list[StoredFile]:
        """Return the files of the table, whichever rows are asked for."""
        return list(self.stored_in)

    def digest(self, rows: Sequence[int], contents: Sequence[bytes] | None) -> str:
        """Return the sha256 of the sha256 of those files."""
        return hashlib.sha256(b"".join(file_digest(one.path) for one in self.stored_in)).hexdigest()

    def names(self, rows: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield the file name that each row has, and the bytes of its image, -1 for none."""
        import pyarrow.compute as pc

        for start in range(0, len(rows), _AT_ONCE):
            some = self.records.select(rows[start : start + _AT_ONCE]).with_format("arrow")
            stored = some[:][self.column].combine_chunks()
            sizes = pc.binary_length(stored.field("bytes")).to_pylist()
            for path, size in zip(stored.field("path").to_pylist(), sizes, strict=True):
                if size is None and path is not None:
                    with contextlib.suppress(OSError):
                        size = os.stat(path).st_size
                yield self._name(path), -1 if size is None else size

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
        roles: of the splits that are needed: train, test.
        quiet: show no progress.

    Returns:
        The listings by role, and the class names in label order.

    Raises:
        UsageError: see ``open_tables``; or a split, column or label cannot be used.
    """
    splits, stored = open_tables(data, folder, quiet)
    import datasets  # is there: opening has required it

    asked = {"train": data.train_split, "test": data.test_split}
    tables = {role: _split(splits, asked[role], f"--{role}-split") for role in roles}
    first, *others = (table.features for table in tables.values())
    image = image_column(first, data.image_column)
    label = label_column(first, data.label_column)
    for other in others:
        if other.get(image) != first[image] or other.get(label) != first[label]:
            raise UsageError(
                f"columns {image!r} and {label!r} of split {data.test_split!r} differ from those "
                f"of {data.train_split!r}: both splits need the same image column and classes"
            )
    classes = classes_of(tables[roles[0]], label)
    if len(classes) < 2:
        raise UsageError(
            f"column {label!r} has {len(classes)} distinct class; at least 2 are needed"
        )
    by_value = not hasattr(first[label], "names")
    listings = {}
    for role, table in tables.items():
        labels = labels_of(table, asked[role], label, classes, by_value)
        records = table.select_columns(image).cast_column(image, datasets.Image(decode=False))
        names = [file["filename"] for file in table.cache_files]
        files = [StoredFile.of(name, os.stat(name)) for name in names]
        # A table that the library keeps in memory has no files, and is not cached by ours.
        files = stored if files and stored is not None else files
        # What a table of another configuration holds is another thing, in the same files.
        about = (data.dataset_config, asked[role], image)
        listings[role] = TableListing(
            asked[role], labels, about, records, image, _roots(folder), files
        )
    return listings, classes


def _roots(folder: Path | None) -> list[Path]:
    """Return the folders that may hold a data set's files: its own, or the hub's caches."""
    import datasets
    import huggingface_hub.constants as hub

    if folder is not None:
        return [folder, kept_tables(folder)]
    return [Path(datasets.config.HF_CACHE_HOME), Path(hub.HF_HUB_CACHE), Path(hub.HF_HOME)]


def _split(splits: Any, name: str, flag: str) -> Any:
    if name not in splits:
        raise UsageError(
            f"the data set has no split {name!r} (it has: {', '.join(splits)}); choose one with "
            f"{flag}, or arrange the folder as train/<class>/*.png and test/<class>/*.png"
        )
    if len(splits[name]) == 0:
        raise UsageError(f"split {name!r} has no images; choose another with {flag}")
    return splits[name]
