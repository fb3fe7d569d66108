"""The command line of trained networks: evaluate, predict, export."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, UsageError
from dml_accel.core.files import can_be_made
from dml_accel.core.tables import printable
from dml_accel.core.versions import command_line
from dml_accel.data import sources
from dml_accel.data.decode import Split
from dml_accel.distributed.launch import launched_processes
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference import export as exporting
from dml_accel.inference import load as trained
from dml_accel.inference import onnx as onnx_model
from dml_accel.inference import predict as predicting
from dml_accel.inference.load import Networks, Trained
from dml_accel.models.peer_folder import description

_EVALUATE = """Measure trained networks on a data set: top-1, top-5, NLL and calibration of every
peer and of their ensemble, as in training; accuracy by class, and what is taken for what, as tables
and a picture. Each network's inputs are prepared as it was trained; the data set's classes are
those that it was trained on, in any order."""

_EVALUATE_EXAMPLES = """examples:
  %(prog)s runs/pair                                      # on the test split of its own data set
  %(prog)s runs/pair --dataset path/to/folder --test-split validation
  %(prog)s runs/pair/peers/resnet8-0 --dataset digits --to digits-of-resnet8
"""

_PREDICT = """Say what trained networks see in images: the five likeliest classes of each. A run
answers as an ensemble, by the mean posterior of its peers. Images become squares as in training. Of
an animation the first frame is used. What cannot be read is named on stderr and left out; the exit
code is 1 then, and 2 where there was no image at all."""

_PREDICT_EXAMPLES = """examples:
  %(prog)s runs/pair cat.png holiday/               # files, and folders with all that is below
  %(prog)s runs/pair --peer resnet8-0 'photos/**/*.jpg'
  find photos -name '*.png' | %(prog)s runs/pair - --format jsonl
"""

_EXPORT = """Write a trained network, or all of a run, into a folder of its own. safetensors: what
timm loads (local-dir:DIR); an ensemble is a folder for each peer. onnx: one model.onnx, from
normalised float32 images [batch, 3, size, size] to logits, or to the log of the ensemble's mean
posterior, compared with torch before it is kept. config.json has the names of the classes, the size
of the inputs, their mean and deviation; README.md is a model card."""

_EXPORT_EXAMPLES = """examples:
  %(prog)s runs/pair --peer resnet8-0 --to resnet8
  %(prog)s runs/pair --peer best --to best          # needs a run with --val-fraction
  %(prog)s runs/pair --peer ensemble --format onnx --to ensemble
"""

Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_commands(add: Add) -> dict[str, argparse.ArgumentParser]:
    """Add the commands to a command line.

    Args:
        add: from name, short text, description and examples to a parser.
    """
    return {
        "evaluate": _add_evaluate(add),
        "predict": _add_predict(add),
        "export": _add_export(add),
    }


def _add_evaluate(add: Add) -> argparse.ArgumentParser:
    evaluating = add("evaluate", "measure trained networks", _EVALUATE, _EVALUATE_EXAMPLES)
    _add_source(evaluating, "RUN|PEER", "a run folder, or peers/<name> of one")
    evaluating.add_argument(
        "--dataset", metavar="TEXT", help="as of train (default: the one that the run has)"
    )
    for name, text in (
        ("image-column", "column of images (default: the only image column)"),
        ("label-column", "column of classes (default: inferred as in training)"),
        ("test-split", "split to measure on (default: the run's on its own data set, else test)"),
    ):
        evaluating.add_argument(f"--{name}", metavar="TEXT", help=text)
    evaluating.add_argument(
        "--to",
        metavar="DIR",
        help=f"folder of {', '.join(evaluation.FILES)} (default: evaluations/<dataset>-<split> in "
        "RUN or PEER)",
    )
    evaluating.add_argument("--cpu", action="store_true", help="compute on the CPU")
    return evaluating


def _add_predict(add: Add) -> argparse.ArgumentParser:
    answering = add("predict", "say what is in images", _PREDICT, _PREDICT_EXAMPLES)
    _add_source(answering, "RUN|PEER", "a run folder, or peers/<name> of one")
    answering.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders or quoted globs; - reads names from stdin, one a line",
    )
    answering.add_argument("--peer", metavar="NAME", help="one peer of the run alone")
    answering.add_argument(
        "--format",
        choices=predicting.FORMATS,
        help="table; jsonl: an object an image; csv: a line for each of its classes (default: "
        "table on a terminal, else jsonl)",
    )
    answering.add_argument("--cpu", action="store_true", help="compute on the CPU")
    return answering


def _add_export(add: Add) -> argparse.ArgumentParser:
    exporting_ = add("export", "a network as a folder of its own", _EXPORT, _EXPORT_EXAMPLES)
    _add_source(exporting_, "RUN", "a run folder, or peers/<name> of one")
    exporting_.add_argument(
        "--peer",
        metavar="NAME",
        help="a peer's name, best (by validation accuracy) or ensemble (default: the only peer)",
    )
    exporting_.add_argument("--to", metavar="DIR", required=True, help="a new or empty folder")
    exporting_.add_argument(
        "--format", choices=exporting.FORMATS, default="safetensors", help="(default: safetensors)"
    )
    return exporting_


def _add_source(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument("source", metavar=name, help=text)


def run(command: str, values: dict[str, Any]) -> int:
    """Run one of the commands; return the exit code.

    Args:
        command: its name.
        values: its arguments.

    Raises:
        UsageError: see the text.
    """
    if launched_processes() > 1:
        raise UsageError(f"{command} is one process; start it without a launcher")
    found = trained.find(Path(values["source"]).expanduser())
    return {"evaluate": _evaluate, "predict": _predict, "export": _export}[command](found, values)


# ---------------------------------------------------------------- evaluate


def _refuse_other_files(folder: Path, config: Config) -> None:
    """Refuse to replace files that are not those of an evaluation of the same images."""
    there = [name for name in evaluation.FILES if (folder / name).exists()]
    known: dict[str, Any] = {}
    with contextlib.suppress(UsageError):
        known = description(folder / "evaluation.json")
    if there and (known.get("dataset"), known.get("split")) != (config.dataset, config.test_split):
        raise UsageError(
            f"{folder} holds {', '.join(there)} of something else; name another folder with --to"
        )


def _evaluate(found: Trained, values: dict[str, Any]) -> int:
    config = _images_of(found, values)
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(config.dataset).name)
    default = found.path / "evaluations" / f"{slug}-{config.test_split}"
    folder = Path(values["to"]).expanduser() if values["to"] else default
    if not can_be_made(folder):
        raise UsageError(f"{folder} cannot be made or written; name a folder with --to")
    _refuse_other_files(folder, config)
    device = trained.device_of(values["cpu"])
    networks = Networks(found, device)
    split, classes = sources.read_test(config)
    labels = evaluation.by_name(split.labels, classes, found.classes, str(found.path))
    if classes != found.classes:
        missing = len(found.classes) - len(classes)
        what = f"{missing} known classes are not in the data set" if missing else "another order"
        print(f"classes are matched by name: {what}", file=sys.stderr)
    split = Split(split.images, labels)
    about = {
        "of": str(found.path),
        "dataset": config.dataset,
        "split": config.test_split,
        "command": command_line(),
    }
    measured = evaluation.evaluate(found, networks, split, device, about)
    evaluation.write(measured, folder)
    print(f"{len(split):,} images of {config.dataset} ({config.test_split})\n")
    print(evaluation.as_text(measured))
    files = [name for name in evaluation.FILES if (folder / name).exists()]
    print(f"\nfiles: {folder}/ {', '.join(files)}")
    return 0


def _images_of(found: Trained, values: dict[str, Any]) -> Config:
    """Return the configuration that names the images: the run's where it is its own data set."""
    names = ("dataset", "image_column", "label_column", "test_split")
    given = {name: values[name] for name in names if values[name] is not None}
    ran = found.run.get("config")
    ran = ran if isinstance(ran, dict) else {}
    if "dataset" not in given and not ran.get("dataset"):
        raise UsageError(f"--dataset is needed: {found.path} is no run, which would name its own")
    if given.get("dataset", ran.get("dataset")) == ran.get("dataset"):
        given = {name: ran[name] for name in names if ran.get(name) is not None} | given
    return Config.from_dict({**given, "image_size": found.image_size})


# ---------------------------------------------------------------- predict


def _predict(found: Trained, values: dict[str, Any]) -> int:
    if values["peer"]:
        found = found.only(values["peer"])
    style = values["format"] or ("table" if sys.stdout.isatty() else "jsonl")
    bad = 0

    def report(name: str, reason: str) -> None:
        nonlocal bad
        bad += 1
        print(f"{printable(name)}: {printable(reason)}", file=sys.stderr, flush=True)

    networks = Networks(found, trained.device_of(values["cpu"]))
    found_any = False

    def names() -> Iterator[str]:
        nonlocal found_any
        for name in predicting.names_of(values["images"], sys.stdin, report):
            found_any = True
            yield name

    good: list[predicting.Prediction] = []
    seen = 0
    for batch in predicting.predict(networks, found.image_size, names(), report):
        if style == "table":  # its columns are as wide as the longest of all
            good += batch
        else:
            head = predicting.CSV_HEADER if style == "csv" and not seen else ""
            lines = predicting.as_lines(batch, found.classes, style)
            print(head + lines, end="", flush=True)
        seen += len(batch)
    if good:
        print(predicting.as_table(good, found.classes), flush=True)
    if not found_any:
        raise UsageError(f"there is no image in {' '.join(values['images'])}")
    return 1 if bad else 0


# ---------------------------------------------------------------- export


def _export(found: Trained, values: dict[str, Any]) -> int:
    target = Path(values["to"]).expanduser()
    if values["format"] == "onnx":
        onnx_model.require_installed()
    chosen, name = exporting.choose(found, values["peer"])
    exporting.check_target(target)
    written = exporting.export(chosen, name, values["format"], target)
    print(f"{target}: {written}")
    return 0
