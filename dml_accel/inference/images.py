"""Which images trained networks are evaluated on, and the folder that receives the results."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dml_accel.core.config import ComputeConfig, Config, DataConfig, typed
from dml_accel.core.errors import UsageError
from dml_accel.core.files import can_be_made, read_json
from dml_accel.core.tables import printable
from dml_accel.data import sources
from dml_accel.data.catalogue import DIGITS, find_folder, list_splits
from dml_accel.data.splits import Fingerprint, Split, SplitPrint
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference.load import LAST, TrainedPeers
from dml_accel.training.run_folder import SavedRun

# The flags that say which images are meant.
NAMED_BY = (
    *("dataset", "dataset_config", "image_column", "label_column"),
    *("test_split", "test_fraction", "bad_images"),
)
# What selects the images of a run beside them.
_OF_ITS_OWN = ("train_split",)


# ---------------------------------------------------------------- images


def choose_images(peers: TrainedPeers, flags: Mapping[str, Any]) -> DataConfig:
    """Return which images to evaluate on: the run's own, unless flags name others.

    Args:
        peers: that are evaluated.
        flags: ``NAMED_BY`` and their values; None for those that are not given.

    Raises:
        UsageError: nothing names the data set, it is gone, or a value is wrong.
    """
    given = {name: typed(name, flags[name]) for name in NAMED_BY if flags[name] is not None}
    if folder := find_folder(given.get("dataset", DIGITS)):
        given["dataset"] = str(folder)
    own = {name: value for name, value in peers.config.items() if name in (*NAMED_BY, *_OF_ITS_OWN)}
    if "dataset" not in given and not own.get("dataset"):
        raise UsageError(
            f"--dataset is needed: {peers.path} is not a run, which would name its data set"
        )
    theirs, is_gone = _data_set_of(peers)
    if is_gone and "dataset" not in given:
        raise UsageError(
            f"{theirs}, the data set of {peers.path}, is not there any more: say with --dataset "
            "where it lies now"
        )
    named = frozenset(given)
    # Columns and splits of the run belong to its own data set, which may have moved.
    if is_gone or given.get("dataset", theirs) == theirs:
        given = own | given
        if "test_split" in named and "test_fraction" not in named:
            given.pop("test_fraction", None)
    return Config(**given, image_size=peers.image_size).data


def _data_set_of(peers: TrainedPeers) -> tuple[str, bool]:
    """Return the data set of a run, empty without one, and whether its folder has gone."""
    theirs = str(peers.config.get("dataset") or "")
    return theirs, os.path.isabs(theirs) and not os.path.exists(theirs)


def read_images(
    peers: TrainedPeers, data: DataConfig, compute: ComputeConfig, named: bool
) -> tuple[Split, SplitPrint]:
    """Read the images, with labels as indices of the networks' classes.

    Args:
        peers: whose classes and inputs.
        data: which images.
        compute: where they come from.
        named: whether the user has named the data set; else it must be that of the training.
    """
    if data.dataset == DIGITS and compute.feed == "loader":
        raise UsageError("--feed loader has no effect with --dataset digits: drop it")
    split, classes, images = sources.read_test(
        data, peers.geometry, peers.grey_bits, compute=compute
    )
    labels = evaluation.match_labels(split.labels, classes, peers.classes, str(peers.path))
    # A split need not have images of all classes, and its own names may be fewer.
    images = SplitPrint.of(labels, len(peers.classes), images.pixels, images.files)
    recorded = SavedRun(peers.path).description.get("data") if peers.config else None
    theirs, is_gone = _data_set_of(peers)
    own = is_gone or data.dataset == theirs
    if recorded and own and data.test_split == peers.config.get("test_split"):
        difference = Fingerprint(peers.classes, {"test": images}).difference(recorded)
        if difference and not named:
            raise UsageError(
                f"the images of {data.dataset} have changed since {peers.path} was trained: "
                f"{difference}; restore them, or name them with --dataset to evaluate on them as "
                "they are"
            )
        if difference:
            print(f"not the images of the training: {difference}", file=sys.stderr)
    if classes != peers.classes:
        missing = len(peers.classes) - len(classes)
        how = f"the data set lacks {missing} of them" if missing else "their order differs"
        print(f"classes are matched by name: {how}", file=sys.stderr)
    return Split(split.images, labels, unread=split.unread), images


def unread_images(data: DataConfig, split: Split) -> list[str]:
    """Return the images of a split in memory that could not be read."""
    if split.unread is None:
        return []
    listing = list_splits(data, ("test",), quiet=True).splits["test"]
    return [printable(listing.place(row)) for row in split.unread.nonzero()[:, 0].tolist()]


# ---------------------------------------------------------------- the folder


def folder_of(peers: TrainedPeers, data: DataConfig) -> Path:
    """Return the folder of an evaluation that is not told where to: one below the run's."""
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(data.dataset).name)
    at = "" if peers.step is None else f"-step-{peers.step:08d}"
    at += "" if peers.weights == LAST else f"-{peers.weights}"
    return peers.path / "evaluations" / f"{slug}-{data.test_split}{at}"


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, or holds files of something else."""
    if not can_be_made(folder):
        raise UsageError(f"{folder} cannot be created or written; name a folder with --to")
    present = [name for name in evaluation.FILES if (folder / name).exists()]
    if present and "split" not in _record(folder):
        raise UsageError(
            f"{folder} holds {', '.join(present)} of something else; name another folder with --to"
        )


def _record(folder: Path) -> dict[str, Any]:
    """Return the record of an evaluation; empty if there is none."""
    with contextlib.suppress(UsageError):
        return read_json(folder / evaluation.RECORD)
    return {}


def refuse_other_evaluation(folder: Path, data: DataConfig, images: SplitPrint) -> None:
    """Refuse to overwrite an evaluation on other images."""
    before = _record(folder)
    if not before:
        return
    same = (before.get("dataset"), before.get("split")) == (data.dataset, data.test_split)
    if "images" in before:
        try:
            recorded = SplitPrint(**before["images"])
            same = before["split"] == data.test_split and images.is_same(recorded)
        except (KeyError, TypeError):  # it is not what an evaluation writes
            same = False
    if not same:
        raise UsageError(
            f"{folder} holds the evaluation on other images, of {before.get('dataset')} "
            f"({before.get('split')}); name another folder with --to"
        )
