"""The commands for trained networks: evaluate, predict and export, and what they print."""

import sys
from collections.abc import Iterator
from typing import Any

from dml_accel.api.trained import evaluate_as, export_as, opened
from dml_accel.core.errors import UsageError
from dml_accel.core.tables import printable
from dml_accel.core.versions import command_line
from dml_accel.distributed.device import choose_device
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference import predict as prediction
from dml_accel.inference.load import Networks


def run(command: str, values: dict[str, Any]) -> int:
    """Run one of the commands; return the exit code.

    Args:
        command: its name.
        values: its arguments.

    Raises:
        UsageError: the input does not allow it; the text says why.
    """
    return {"evaluate": _evaluate, "predict": _predict, "export": _export}[command](values)


def _evaluate(values: dict[str, Any]) -> int:
    found = evaluate_as(values, command_line())
    print(f"{found.title}\n")
    print(evaluation.evaluation_text(found.results))
    written = [name for name in evaluation.FILES if (found.path / name).exists()]
    print(f"\nfiles: {found.path}/ {', '.join(written)}")
    return 0


# ---------------------------------------------------------------- predict


def _predict(values: dict[str, Any]) -> int:
    style = values["format"] or ("table" if sys.stdout.isatty() else "jsonl")
    with opened(values["source"], values["checkpoint"], values["weights"]) as peers:
        if values["peer"]:
            peers = peers.only(values["peer"])
        networks = Networks(peers, choose_device(values["cpu"]))
    files = _Files(values["images"])
    images = prediction.read_images(files, peers.geometry, files.report, peers.grey_bits)
    rows: list[prediction.ImagePrediction] = []
    header = prediction.CSV_HEADER if style == "csv" else ""
    for batch in prediction.predict(networks, images):
        if style == "table":  # a column is as wide as its longest cell, so all are printed at once
            rows += batch
            continue
        print(header + prediction.predictions_lines(batch, style), end="", flush=True)
        header = ""
    if rows:
        print(prediction.predictions_table(rows), flush=True)
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


def _export(values: dict[str, Any]) -> int:
    made = export_as(values)
    print(f"{made.folder or made.address}: {made.text}")
    if made.address:
        print("\n".join((made.address, *made.notes)))
    return 0
