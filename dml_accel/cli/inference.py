"""The commands for trained networks: evaluate, predict and export."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dml_accel.core.config import ComputeConfig, Config, DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.files import can_be_made, read_json
from dml_accel.core.host import expanded, is_on_hub
from dml_accel.core.tables import printable
from dml_accel.core.versions import command_line, require_packages
from dml_accel.data import sources
from dml_accel.data.catalogue import DIGITS, find_folder, list_splits
from dml_accel.data.feeds import reading_workers
from dml_accel.data.selection import split_names
from dml_accel.data.splits import Fingerprint, Split, SplitPrint
from dml_accel.distributed.device import choose_device
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference import onnx
from dml_accel.inference import predict as prediction
from dml_accel.inference.checkpoints import read_checkpoint_peers
from dml_accel.inference.export import deliver, export, select_peers
from dml_accel.inference.load import BEST, LAST, Networks, TrainedPeers, read_trained_peers
from dml_accel.models.hub import local_folder, name_of
from dml_accel.training.run_folder import SavedRun

# What selects the images of a run beside the flags of evaluate.
_COLUMNS = ("image_column", "label_column")
_OF_ITS_OWN = ("train_split",)
_NAMED = 5  # images that cannot be read


def run(command: str, values: dict[str, Any]) -> int:
    """Run one of the commands; return the exit code.

    Args:
        command: its name.
        values: its arguments.

    Raises:
        UsageError: the input does not allow it; the text says why.
    """
    if command == "evaluate" and is_on_hub(values["source"]) and not values["to"]:
        raise UsageError(f"evaluate {values['source']} needs --to, a folder for its results")
    path, asked = local_folder(values["source"]), values["checkpoint"]
    use = {"evaluate": _evaluate, "predict": _predict, "export": _export}[command]
    weights = _which_weights(command, path, values)
    if asked is None:
        peers = read_trained_peers(path, weights)
        if peers.which:
            print(peers.which, file=sys.stderr, flush=True)
        return use(peers, values)
    with tempfile.TemporaryDirectory() as scratch:
        peers = read_checkpoint_peers(path, asked, Path(scratch), weights)
        print(peers.which, file=sys.stderr, flush=True)
        return use(peers, values)


def _which_weights(command: str, path: Path, values: dict[str, Any]) -> str:
    """Return which weights are meant: the last, unless others are named or the best peer's are."""
    if values["weights"]:
        return str(values["weights"])
    if command == "export" and values["peer"] == BEST and values["checkpoint"] is None:
        with contextlib.suppress(UsageError):  # not a finished run, which is refused later
            return BEST if BEST in SavedRun(path).results else LAST
    return LAST


# ---------------------------------------------------------------- evaluate


def _evaluate(peers: TrainedPeers, values: dict[str, Any]) -> int:
    require_packages("evaluate", "matplotlib")
    data = _choose_images(peers, values)
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(data.dataset).name)
    at = "" if peers.step is None else f"-step-{peers.step:08d}"
    at += "" if peers.weights == LAST else f"-{peers.weights}"
    default = peers.path / "evaluations" / f"{slug}-{data.test_split}{at}"
    folder = Path(values["to"]).expanduser() if values["to"] else default
    _check_folder(folder)
    device = choose_device(values["cpu"])
    compute = ComputeConfig(feed=values["feed"], workers=values["workers"])
    networks = Networks(peers, device)
    split, images = _read_images(peers, data, compute, bool(values["dataset"]))
    _refuse_other_evaluation(folder, data, images)
    origin = {
        "of": name_of(peers.path),
        "dataset": data.dataset,
        "split": data.test_split,
        "images": vars(images),
        "command": command_line(),
        **({"step": peers.step, "checkpoint": peers.note} if peers.note else {}),
        **({"weights": peers.weights} if peers.weights != LAST else {}),
    }
    reading = evaluation.Reading(
        reading_workers(compute, on_cpu=device.type == "cpu"), data.bad_images == "skip"
    )
    result = evaluation.evaluate(peers, networks, split, device, origin, reading)
    evaluation.write_evaluation(result, folder)
    unread = _unread(data, split) or [one.place for one in reading.damage]
    if unread:
        some = ", ".join(unread[:_NAMED]) + ", ..." * (len(unread) > _NAMED)
        count = f"{len(unread):,} image{'s' * (len(unread) > 1)}"
        print(f"cannot be read, and not counted: {count}: {some}", file=sys.stderr)
    by = f", by {peers.which}" if peers.which else ""
    read = f"{len(split) - len(unread):,} of " if unread else ""
    print(f"{read}{len(split):,} images of {data.dataset}, split {split_names(data).test}{by}\n")
    print(evaluation.evaluation_text(result.record))
    written = [name for name in evaluation.FILES if (folder / name).exists()]
    print(f"\nfiles: {folder}/ {', '.join(written)}")
    return 0


def _choose_images(peers: TrainedPeers, values: dict[str, Any]) -> DataConfig:
    """Return which images to evaluate on: the run's own, unless flags name others."""
    names = ("dataset", "dataset_config", *_COLUMNS, "test_split", "test_fraction", "bad_images")
    given = {name: values[name] for name in names if values[name] is not None}
    if folder := find_folder(given.get("dataset", DIGITS)):
        given["dataset"] = str(folder)
    own = {name: value for name, value in peers.config.items() if name in (*names, *_OF_ITS_OWN)}
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
    # Columns and splits of the run belong to its own data set, which may have moved.
    if is_gone or given.get("dataset", theirs) == theirs:
        given = own | given
        if values["test_split"] and values["test_fraction"] is None:
            given.pop("test_fraction", None)
    return Config(**given, image_size=peers.image_size).data


def _data_set_of(peers: TrainedPeers) -> tuple[str, bool]:
    """Return the data set of a run, empty without one, and whether its folder has gone."""
    theirs = str(peers.config.get("dataset") or "")
    return theirs, os.path.isabs(theirs) and not os.path.exists(theirs)


def _check_folder(folder: Path) -> None:
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


def _refuse_other_evaluation(folder: Path, data: DataConfig, images: SplitPrint) -> None:
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


def _unread(data: DataConfig, split: Split) -> list[str]:
    """Return the images of a split in memory that could not be read."""
    if split.unread is None:
        return []
    listing = list_splits(data, ("test",), quiet=True).splits["test"]
    return [printable(listing.place(row)) for row in split.unread.nonzero()[:, 0].tolist()]


def _read_images(
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


# ---------------------------------------------------------------- predict


def _predict(peers: TrainedPeers, values: dict[str, Any]) -> int:
    if values["peer"]:
        peers = peers.only(values["peer"])
    style = values["format"] or ("table" if sys.stdout.isatty() else "jsonl")
    networks = Networks(peers, choose_device(values["cpu"]))
    files = _Files(values["images"])
    rows: list[prediction.ImagePrediction] = []
    header = prediction.CSV_HEADER if style == "csv" else ""
    for batch in prediction.predict(networks, peers.geometry, files, files.report, peers.grey_bits):
        if style == "table":  # a column is as wide as its longest cell, so all are printed at once
            rows += batch
            continue
        lines = prediction.predictions_lines(batch, peers.classes, style)
        print(header + lines, end="", flush=True)
        header = ""
    if rows:
        print(prediction.predictions_table(rows, peers.classes), flush=True)
    if not files.count:
        raise UsageError(f"there is no image in {' '.join(values['images'])}")
    return 1 if files.errors else 0


class _Files:
    """The image files that words of the command line stand for, counted, and their errors.

    Args:
        words: see ``inference.predict.find_images``.
    """

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self.count = self.errors = 0

    def __iter__(self) -> Iterator[str]:
        for name in prediction.find_images(self._words, sys.stdin, self.report):
            self.count += 1
            yield name

    def report(self, name: str, reason: str) -> None:
        """Print why a file or word cannot be used."""
        self.errors += 1
        print(f"{printable(name)}: {printable(reason)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- export


def _export(peers: TrainedPeers, values: dict[str, Any]) -> int:
    if values["format"] == "onnx":
        require_packages("--format onnx", *onnx.PACKAGES)
    chosen, name = select_peers(peers, values["peer"])
    made = deliver(
        lambda folder: export(chosen, name, values["format"], folder),
        expanded(values["to"]) if values["to"] else None,
        values["push_to"],
        values["private"],
    )
    print(f"{made.folder or made.address}: {made.text}")
    if made.address:
        print("\n".join((made.address, *made.notes)))
    return 0
