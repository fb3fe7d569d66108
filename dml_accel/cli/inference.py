"""The commands for trained networks: evaluate, predict and export."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, DataConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.files import can_be_made, read_json
from dml_accel.core.tables import printable
from dml_accel.core.versions import command_line, require_packages
from dml_accel.data import sources
from dml_accel.data.decode import Split
from dml_accel.distributed.device import choose_device
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference import onnx
from dml_accel.inference import predict as prediction
from dml_accel.inference.checkpoints import read_checkpoint_peers
from dml_accel.inference.export import check_target, export, select_peers
from dml_accel.inference.load import Networks, TrainedPeers, read_trained_peers


def run(command: str, values: dict[str, Any]) -> int:
    """Run one of the commands; return the exit code.

    Args:
        command: its name.
        values: its arguments.

    Raises:
        UsageError: the input does not allow it; the text says why.
    """
    path, asked = Path(values["source"]).expanduser(), values["checkpoint"]
    use = {"evaluate": _evaluate, "predict": _predict, "export": _export}[command]
    if asked is None:
        return use(read_trained_peers(path), values)
    with tempfile.TemporaryDirectory() as scratch:
        peers = read_checkpoint_peers(path, asked, Path(scratch))
        print(peers.note, file=sys.stderr, flush=True)
        return use(peers, values)


# ---------------------------------------------------------------- evaluate


def _evaluate(peers: TrainedPeers, values: dict[str, Any]) -> int:
    require_packages("evaluate", "matplotlib")
    data = _choose_images(peers, values)
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(data.dataset).name)
    at = "" if peers.step is None else f"-step-{peers.step:08d}"
    default = peers.path / "evaluations" / f"{slug}-{data.test_split}{at}"
    folder = Path(values["to"]).expanduser() if values["to"] else default
    _check_folder(folder, data)
    device = choose_device(values["cpu"])
    networks = Networks(peers, device)
    split = _read_images(peers, data)
    origin = {
        "of": str(peers.path),
        "dataset": data.dataset,
        "split": data.test_split,
        "command": command_line(),
        **({"step": peers.step, "checkpoint": peers.note} if peers.note else {}),
    }
    result = evaluation.evaluate(peers, networks, split, device, origin)
    evaluation.write_evaluation(result, folder)
    by = f", by {peers.note}" if peers.note else ""
    print(f"{len(split):,} images of {data.dataset} ({data.test_split}){by}\n")
    print(evaluation.evaluation_text(result.record))
    written = [name for name in evaluation.FILES if (folder / name).exists()]
    print(f"\nfiles: {folder}/ {', '.join(written)}")
    return 0


def _choose_images(peers: TrainedPeers, values: dict[str, Any]) -> DataConfig:
    """Return which images to evaluate on: the run's own, unless flags name others."""
    names = ("dataset", "image_column", "label_column", "test_split")
    given = {name: values[name] for name in names if values[name] is not None}
    own = {name: peers.config[name] for name in names if peers.config.get(name) is not None}
    if "dataset" not in given and not own.get("dataset"):
        raise UsageError(
            f"--dataset is needed: {peers.path} is not a run, which would name its data set"
        )
    # Columns and splits of the run belong to its own data set.
    if given.get("dataset", own.get("dataset")) == own.get("dataset"):
        given = own | given
    return Config(**given, image_size=peers.image_size).data


def _check_folder(folder: Path, data: DataConfig) -> None:
    """Refuse a folder that cannot be written, or holds files of another evaluation."""
    if not can_be_made(folder):
        raise UsageError(f"{folder} cannot be created or written; name a folder with --to")
    present = [name for name in evaluation.FILES if (folder / name).exists()]
    record: dict[str, Any] = {}
    with contextlib.suppress(UsageError):
        record = read_json(folder / evaluation.RECORD)
    if present and (record.get("dataset"), record.get("split")) != (data.dataset, data.test_split):
        raise UsageError(
            f"{folder} holds {', '.join(present)} of something else; name another folder with --to"
        )


def _read_images(peers: TrainedPeers, data: DataConfig) -> Split:
    """Read the images, with labels as indices of the networks' classes."""
    split, classes = sources.read_test(data)
    labels = evaluation.match_labels(split.labels, classes, peers.classes, str(peers.path))
    if classes != peers.classes:
        missing = len(peers.classes) - len(classes)
        how = f"the data set lacks {missing} of them" if missing else "their order differs"
        print(f"classes are matched by name: {how}", file=sys.stderr)
    return Split(split.images, labels)


# ---------------------------------------------------------------- predict


def _predict(peers: TrainedPeers, values: dict[str, Any]) -> int:
    if values["peer"]:
        peers = peers.only(values["peer"])
    style = values["format"] or ("table" if sys.stdout.isatty() else "jsonl")
    networks = Networks(peers, choose_device(values["cpu"]))
    files = _Files(values["images"])
    rows: list[prediction.ImagePrediction] = []
    header = prediction.CSV_HEADER if style == "csv" else ""
    for batch in prediction.predict(networks, peers.image_size, files, files.report):
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
    target = Path(values["to"]).expanduser()
    if values["format"] == "onnx":
        require_packages("--format onnx", *onnx.PACKAGES)
    chosen, name = select_peers(peers, values["peer"])
    check_target(target)
    print(f"{target}: {export(chosen, name, values['format'], target)}")
    return 0
