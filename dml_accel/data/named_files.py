"""Images that a ``metadata.csv``, ``.jsonl`` or ``.parquet`` beside them names."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.data.class_layout import lists_images
from dml_accel.data.image_files import kind_of
from dml_accel.data.listing import StoredFiles

_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def metadata_in(folder: Path, files: StoredFiles) -> list[Path]:
    """Return the files below a folder that name images, in the order of their paths."""
    places = (Path(files.path(row)) for row in range(len(files)))
    return [path for path in places if path.name in _FILES and lists_images(path)]


def read_named(
    folder: Path, tables: Sequence[Path], files: StoredFiles, asked: Sequence[str], quiet: bool
) -> Mapping[str, Any]:
    """Return a table of each split; the images stay where they are.

    A split is called as the folder that holds the file, or the images that it names.

    Args:
        folder: of the data set.
        tables: see ``metadata_in``.
        files: all files below the folder.
        asked: names of splits.
        quiet: do not say what is left out.

    Raises:
        UsageError: a file cannot be read, or has no column ``file_name``.
    """
    import datasets
    import pyarrow as pa

    found: dict[str, list[Any]] = {}
    named: set[int] = set()  # numbers, because so many texts would fill the memory
    for path in tables:
        table = _read(path)
        if "file_name" not in table.column_names:
            raise UsageError(f"{path} has no column file_name, which names the images")
        names = table.column("file_name").cast(pa.string()).to_pylist()
        places = [None if name is None else _below(path.parent, name) for name in names]
        named.update(map(hash, places))
        image = datasets.Image()
        stored = pa.StructArray.from_arrays(
            [pa.nulls(len(places), pa.binary()), pa.array(places, pa.string())], ["bytes", "path"]
        )
        table = table.drop_columns(["file_name"])
        if "image" in table.column_names:
            raise UsageError(f"{path} has a column image, beside file_name: remove it")
        features = {"image": image, **datasets.Features.from_arrow_schema(table.schema)}
        table = table.add_column(0, "image", stored).replace_schema_metadata(None)
        for split, rows in _by_split(folder, path, places, asked).items():
            part = table if rows is None else table.take(rows)
            info = datasets.DatasetInfo(features=datasets.Features(features))
            found.setdefault(split, []).append(datasets.Dataset(part, info=info))
    if not quiet:
        paths = (files.path(row) for row in range(len(files)))
        left = sum(kind_of(path) == "image" and hash(path) not in named for path in paths)
        if left:
            print(
                f"warning: {left:,} image file{'s' * (left != 1)} of {printable(str(folder))} left "
                "out: no metadata file names them",
                file=sys.stderr,
            )
    return {split: datasets.concatenate_datasets(parts) for split, parts in found.items()}


def _below(folder: Path, name: str) -> str:
    return os.path.normpath(os.path.join(folder, name))


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    readers = {
        ".csv": lambda: pa.csv.read_csv(path, convert_options=_texts()),
        ".jsonl": lambda: pa.json.read_json(path),
        ".parquet": lambda: pa.parquet.read_table(path, partitioning=None),
    }
    try:
        return readers[path.suffix]()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _texts() -> Any:
    import pyarrow as pa
    import pyarrow.csv

    return pa.csv.ConvertOptions(column_types={"file_name": pa.string()})


def _by_split(
    folder: Path, path: Path, places: Sequence[str | None], asked: Sequence[str]
) -> dict[str, list[int] | None]:
    """Return the rows of each split that a file has; None for all."""
    inside = path.parent.relative_to(folder)
    if inside.parts:
        named = [name for name in asked if inside.is_relative_to(name)]
        return {max(named, key=len, default=inside.parts[0]): None}
    rows: dict[str, list[int]] = {}
    for row, place in enumerate(places):
        below = os.path.relpath(place, folder) if place else ""
        named = [name for name in asked if Path(below).is_relative_to(name)]
        rows.setdefault(max(named, key=len, default=Path(below).parts[0]), []).append(row)
    if any(name in rows for name in asked):
        return dict(rows)
    return {asked[0]: None}
