"""Data sets that the datasets library opens: of the hub, parquet files, ``save_to_disk``.

The library keeps tables in a cache of its own. A name never leads to what it has kept for a folder:
tables of a local folder are kept by its path, and made again when a file in it has changed.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.host import require_hub_cache
from dml_accel.core.locks import lock
from dml_accel.core.rng import key
from dml_accel.core.tables import printable
from dml_accel.core.versions import require_packages
from dml_accel.data.image_files import files_below
from dml_accel.data.listing import Listing, StoredFile, file_digest

_SHOWN_CONFIGURATIONS = 8


# ---------------------------------------------------------------- opening


def open_tables(
    data: DataConfig, folder: Path | None, quiet: bool
) -> tuple[Any, list[StoredFile] | None]:
    """Open a data set with the datasets library; nothing is decoded.

    Args:
        data: its name and configuration.
        folder: the local folder that the name stands for; None for the hub.
        quiet: show no progress, because another process does.

    Returns:
        A mapping from names of splits to tables, and the files of the folder that they come from;
        None for the hub.

    Raises:
        UsageError: it cannot be reached or read, or has several configurations.
    """
    require_packages(f"--dataset {data.dataset}", "datasets")
    require_hub_cache()
    import datasets  # imported late: it takes a second, which digits does not need

    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Older versions would ask whether to run a program that a data set brings along.
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    name = data.dataset
    try:
        if folder is None:
            name = _id_on_the_hub(name)
            return _load(name, data.dataset_config, None), None
        files = _files_in(folder)
        found = _open_folder(folder, files, data.dataset_config)
        if not isinstance(found, Mapping):
            raise UsageError(
                f"--dataset {name} was saved as a single split: save a DatasetDict with the splits "
                f"{data.train_split!r} and {data.test_split!r}"
            )
        return found, files
    except UsageError:
        raise
    except ConnectionError as error:
        raise UsageError(
            f"--dataset {name}: the hub cannot be reached, the data set is not cached here, and "
            "there is no local folder of that name. Connect once, name a folder of images, or use "
            "--dataset digits"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UsageError(
            f"--dataset {name}: not a local folder, and not a data set that you can read on the hub"
        ) from error
    except Exception as error:  # the library raises many kinds for files it cannot parse
        _refuse_configurations(str(folder or name), data, error)
        raise UsageError(f"--dataset {name} cannot be read: {_root_cause(error)}") from error


def _load(name: str, configuration: str | None, cache: Path | None) -> Any:
    import datasets

    # Kept on disk, because the cache of decoded images is keyed by those files.
    return datasets.load_dataset(
        name, configuration, keep_in_memory=False, cache_dir=cache and str(cache)
    )


def _open_folder(folder: Path, stored: Sequence[StoredFile], configuration: str | None) -> Any:
    """Open a local folder; its tables are made again if any file in it is another one."""
    import datasets

    kept = _kept(folder)
    kept.mkdir(parents=True, exist_ok=True)
    files = [[*one.name, list(one.state)] for one in stored]
    asked = json.loads(json.dumps({"files": files}))
    with open(kept / "lock", "w") as file:
        lock(file, wait=True)  # without locks, two processes may both make the tables
        record, tables = kept / "files.json", kept / "tables"
        # By a link, because the library takes [ and * in a path for patterns.
        link = _link(kept / "files", folder)
        if any((link / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(link))
        with contextlib.suppress(UnreadableError):
            if read_json(record) == asked:
                return _load(str(link), configuration, tables)
        record.unlink(missing_ok=True)
        shutil.rmtree(tables, ignore_errors=True)
        found = _load(str(link), configuration, tables)
        write_json(record, asked)
    return found


def _kept(folder: Path) -> Path:
    """Return where the tables of a local folder are kept."""
    import datasets

    where = key("tables", os.path.realpath(folder))
    return Path(datasets.config.HF_DATASETS_CACHE) / "dml_accel" / f"{where:016x}"


def _link(path: Path, folder: Path) -> Path:
    """Return a link to a folder at ``path``; the folder itself where there are no links."""
    try:
        if not path.is_symlink():
            path.symlink_to(os.path.realpath(folder), target_is_directory=True)
    except OSError:
        return folder
    return path


def _files_in(folder: Path) -> list[StoredFile]:
    """Return the files in or below a folder, by path; links are followed."""
    found = [
        StoredFile.of(os.path.join(folder, name), stat)
        for name, stat in files_below(folder, "")
        if stat is not None
    ]
    return sorted(found, key=lambda file: file.path)


def _id_on_the_hub(name: str) -> str:
    """Return a data set's id on the hub, ``owner/name``.

    A bare name is asked for on the hub, because offline the library would take any folder of that
    name that it has once read, wherever it lay.
    """
    import datasets
    import huggingface_hub
    import huggingface_hub.constants

    online = hub_answers()
    if not online:
        # Online, the library would retry for half a minute; offline it uses its cache at once.
        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "/" in name:
        return name
    missing = f"--dataset {name}: there is no folder {printable(os.path.abspath(name))}"
    if not online:
        raise UsageError(
            f"{missing}, and the hub cannot be asked; its data sets are called owner/name"
        )
    try:
        return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).id)
    except Exception as error:  # of several libraries below
        raise UsageError(f"{missing}, and the hub has no data set of that name") from error


def hub_answers() -> bool:
    """Whether the hub answers within seconds; any HTTP status counts as an answer."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(
            urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=5
        ).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def _refuse_configurations(name: str, data: DataConfig, error: Exception) -> None:
    """Say which configurations a data set has, if one must be chosen."""
    text = str(error)
    if not ("Config name is missing" in text or "BuilderConfig" in text):
        return
    import datasets

    try:
        found = [str(one) for one in datasets.get_dataset_config_names(name)]
    except Exception:  # then the library's own words have to do
        return
    shown = ", ".join(map(printable, found[:_SHOWN_CONFIGURATIONS]))
    shown += ", ..." * (len(found) > _SHOWN_CONFIGURATIONS)
    asked = f"no configuration {data.dataset_config!r}"
    said = asked if data.dataset_config else f"{len(found)} configurations"
    raise UsageError(
        f"--dataset {data.dataset} has {said}: choose one of {shown} with --dataset-config"
    ) from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------- listing


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
    image = _image_column(first, data.image_column)
    label = _label_column(first, data.label_column)
    for other in others:
        if other.get(image) != first[image] or other.get(label) != first[label]:
            raise UsageError(
                f"columns {image!r} and {label!r} of split {data.test_split!r} differ from those "
                f"of {data.train_split!r}: both splits need the same image column and classes"
            )
    classes = _classes(tables[roles[0]], label)
    if len(classes) < 2:
        raise UsageError(
            f"column {label!r} has {len(classes)} distinct class; at least 2 are needed"
        )
    by_value = not hasattr(first[label], "names")
    listings = {}
    for role, table in tables.items():
        labels = _labels(table, asked[role], label, classes, by_value)
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
        return [folder, _kept(folder)]
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


def _labels(dataset: Any, split: str, column: str, names: Sequence[str], by_value: bool) -> Tensor:
    found, classes = dataset[column][:], len(names)
    if by_value:
        places = {name: place for place, name in enumerate(names)}
        for row, value in enumerate(found):
            if value is None or not str(value).strip():
                _refuse_missing_label(row, split, column)
            if str(value) not in places:
                raise UsageError(
                    f"row {row} of split {split!r} has {column} = {value!r}, a class that the "
                    "training split does not have"
                )
        found = [places[str(value)] for value in found]
    labels = np.asarray(found, dtype=np.float64)
    bad = ~((labels >= 0) & (labels < classes))  # a missing label has become NaN
    if bad.any():
        row = int(bad.argmax())
        if np.isnan(labels[row]):
            _refuse_missing_label(row, split, column)
        raise UsageError(
            f"row {row} of split {split!r} has {column} = {labels[row]:g}; with {classes} classes, "
            f"labels must be 0 to {classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _refuse_missing_label(row: int, split: str, column: str) -> NoReturn:
    raise UsageError(
        f"row {row} of split {split!r} has no label in column {column!r}; give it one, or remove "
        "the row"
    )


def _image_column(features: Any, wanted: str | None) -> str:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if wanted is not None:
        _require_column(features, wanted, "--image-column", images, "images")
        return wanted
    if len(images) != 1:
        raise UsageError(
            f"{len(images)} columns hold images ({', '.join(images) or 'none'}; all columns: "
            f"{', '.join(features)}); name one with --image-column"
        )
    return images[0]


def _label_column(features: Any, wanted: str | None) -> str:
    import datasets

    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if wanted is not None:
        values = [name for name, kind in features.items() if _may_be_classes(kind)]
        _require_column(features, wanted, "--label-column", [*classes, *values], "classes")
        return wanted
    for name in classes if len(classes) == 1 else ("fine_label", "label"):
        if name in classes:
            return name
    raise UsageError(
        f"{len(classes)} columns hold classes ({', '.join(classes) or 'none'}; all columns: "
        f"{', '.join(features)}); name one with --label-column"
    )


def _may_be_classes(kind: Any) -> bool:
    """Whether the values of a column can be used as classes, if the user names it."""
    import datasets

    whole = ("int", "uint", "bool", "string", "large_string")
    return isinstance(kind, datasets.Value) and str(kind.dtype).startswith(whole)


def _classes(split: Any, label: str) -> tuple[str, ...]:
    """Return the class names: the column's own, else the distinct values of the split."""
    names = getattr(split.features[label], "names", None)
    if names is not None:
        return tuple(names)
    found = split.unique(label)
    values = sorted(one for one in found if one is not None and str(one).strip())
    return tuple(map(str, values))


def _require_column(features: Any, name: str, flag: str, usable: list[str], what: str) -> None:
    if name not in usable:
        state = f"holds {features[name]}, not {what}" if name in features else "does not exist"
        raise UsageError(
            f"{flag} {name}: this column {state}; columns of {what}: {', '.join(usable) or 'none'}"
        )
