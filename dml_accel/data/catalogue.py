"""Where a data set lies, and the images of its splits before they are read.

located      the configuration with the absolute path of the folder that it names
list_splits  the images of the splits that are needed, and the class names
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_accel.core.config import Config, DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.host import expanded
from dml_accel.data.class_folders import read_folders
from dml_accel.data.class_layout import HERE, find_layout, is_archive
from dml_accel.data.listing import Listing
from dml_accel.data.table_splits import list_tables

DIGITS = "digits"


@dataclass(frozen=True)
class Listed:
    """The images of a data set before they are read.

    Attributes:
        splits: by role: ``train``, ``test``, and ``val`` if there is such a split.
        classes: names, in label order.
    """

    splits: Mapping[str, Listing]
    classes: tuple[str, ...]


def located(config: Config) -> Config:
    """Return the configuration with the absolute path of the local folder that it names.

    Raises:
        UsageError: the name looks like a path, but leads to no folder.
    """
    folder = find_folder(config.data.dataset)
    return config if folder is None else config.changed(dataset=str(folder))


def find_folder(dataset: str) -> Path | None:
    """Return the absolute path of the local folder that a name stands for; None if it does not.

    Raises:
        UsageError: the name looks like a path, but leads to no folder.
    """
    if dataset == DIGITS:
        return None
    try:
        path = expanded(dataset)
        present = path.exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset {dataset!r} cannot be a folder: {error}") from error
    if not dataset or path.is_file():
        if dataset and is_archive(path):
            raise UsageError(f"--dataset {path} is an archive: unpack it, and name the folder")
        raise UsageError(f"--dataset {dataset!r} is not a folder; name the folder with the images")
    if present:
        return Path(os.path.abspath(path))
    if dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or dataset.endswith("/"):
        raise UsageError(f"--dataset {dataset}: this folder does not exist")
    return None


def folders_read(data: DataConfig) -> list[Path]:
    """Return the local folders that images are read from; none for the hub and digits.

    Raises:
        UsageError: see ``located``, and ``class_layout.find_layout``.
    """
    folder = find_folder(data.dataset)
    if folder is None:
        return []
    layout = find_layout(folder, data, ("train", "val", "test"))
    # Beside a split that is to be cut, any folder with images may be one.
    names = {HERE} if data.test_fraction or not layout else set(layout.splits.values())
    return [folder if name == HERE else folder / name for name in sorted(names)]


def list_splits(data: DataConfig, roles: Sequence[str], quiet: bool) -> Listed:
    """List the images of the splits that are needed; none is read.

    Args:
        data: names the data set, its splits and columns.
        roles: ``train``, ``val``, ``test``; there may be no split ``val``.
        quiet: say nothing of what is left out, and show no progress.

    Raises:
        UsageError: the data set cannot be reached, or a split, column or label cannot be used.
    """
    folder = find_folder(data.dataset)
    layout = find_layout(folder, data, roles) if folder is not None else None
    if layout is None:
        return Listed(*list_tables(data, folder, roles, quiet))
    for name in ("image_column", "label_column", "dataset_config"):
        if getattr(data, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with class folders, which --dataset "
                f"{data.dataset} holds: drop it"
            )
    listings, classes, lines = read_folders(layout)
    if not quiet:
        for line in lines:
            print(line, file=sys.stderr)
    if len(classes) < 2:
        raise UsageError(
            f"--dataset {data.dataset} has images of {len(classes)} class; at least 2 are needed, "
            "each a folder in its split"
        )
    return Listed(listings, classes)
