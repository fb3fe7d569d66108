"""Evaluation of trained networks on a data set: metrics, accuracy by class, confusion matrix.

Shape letters: K networks, N images, B of them, C classes. Row K of a table is the ensemble.
"""

import csv
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from dml_accel.core.errors import UsageError
from dml_accel.core.files import as_utf8, replacing, write_json
from dml_accel.core.tables import percent, printable, results_table, table
from dml_accel.core.versions import versions
from dml_accel.data.decode import DamagedImagesError
from dml_accel.data.loader import plain_reads
from dml_accel.data.pictures import Damage, Pictures
from dml_accel.data.splits import Split
from dml_accel.distributed.device import device_versions
from dml_accel.inference.load import BATCH_SIZE, Networks, TrainedPeers
from dml_accel.models.build import parameter_count
from dml_accel.mutual.metrics import batch_sums, best_five, finish, log_posteriors, no_sums

if TYPE_CHECKING:  # imported when something is drawn, because that takes a second
    from matplotlib.figure import Figure

ENSEMBLE = "ensemble"
RECORD, MATRIX, FIGURE = FILES = ("evaluation.json", "confusion.csv", "confusion.png")
_SHOWN = 10  # classes, and pairs of confused classes, on the screen
_MOST_CLASSES = 2000  # of a confusion matrix, which grows with their square
_MOST_NAMED, _MOST_COUNTED = 100, 20  # classes of a figure with names, and with counts in its cells


@dataclass(frozen=True)
class Reading:
    """How images that are not in memory are read.

    Attributes:
        workers: processes that do it; 0: this one.
        skips: whether those that cannot be read are left out; else they are refused.
        damage: what was left out is added to it.
    """

    workers: int = 0
    skips: bool = False
    damage: list[Damage] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        record: the content of evaluation.json.
        confusion_CC: images of each class (rows) by predicted class (columns), for the ensemble or
            the only network; None if there are too many classes.
        classes: class names.
    """

    record: dict[str, Any]
    confusion_CC: Tensor | None
    classes: tuple[str, ...]


# ---------------------------------------------------------------- labels


def match_labels(labels: Tensor, theirs: Sequence[str], ours: Sequence[str], name: str) -> Tensor:
    """Return a data set's labels as indices of the networks' classes.

    Classes in another order are matched by name, and so is a data set that has only some of them.

    Args:
        labels: of the data set, [N] int64.
        theirs: class names of the data set.
        ours: class names of the networks.
        name: of the networks, for messages.

    Raises:
        UsageError: the networks do not have a class of the data set, or names are ambiguous.
    """
    if tuple(theirs) == tuple(ours):
        return labels
    # Numbers are not names: in a smaller data set, each could mean another class.
    unnamed = all(one.isdecimal() for one in theirs)
    if len(theirs) > len(ours) or (len(theirs) < len(ours) and unnamed):
        raise UsageError(
            f"{name} has {len(ours)} classes, but the data set has {len(theirs)}; try another "
            "--label-column or --dataset"
        )
    for names in (ours, theirs):
        repeated = [one for one, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(
                f"{name}: its classes differ from those of the data set and cannot be matched by "
                f"name, because several are called {_quoted(repeated)}"
            )
    unknown = [one for one in theirs if one not in set(ours)]
    if unknown:
        raise UsageError(
            f"{name} was trained on other classes: it does not have {_quoted(unknown)} of the data "
            f"set, which does not have {_quoted([one for one in ours if one not in set(theirs)])}"
        )
    index = {one: place for place, one in enumerate(ours)}
    return torch.tensor([index[one] for one in theirs])[labels]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, map(printable, names[:3]))) + ", ..." * (len(names) > 3)


# ---------------------------------------------------------------- measuring


def evaluate(
    peers: TrainedPeers,
    networks: Networks,
    split: Split,
    device: torch.device,
    origin: dict[str, Any],
    reading: Reading | None = None,
) -> Evaluation:
    """Evaluate every network and their ensemble on all images of a split.

    Args:
        peers: the peers.
        networks: their networks.
        split: images, and labels as indices of the networks' classes; images that cannot be read
            are not counted.
        device: of the networks.
        origin: further entries of evaluation.json: what was evaluated, and how.
        reading: how images that are not in memory are read (default: in this process).

    Raises:
        DamagedImagesError: images cannot be read when they are needed, and are not to be skipped.
        UsageError: none of the images could be read.
    """
    names, classes = networks.names, len(peers.classes)
    reading = reading or Reading()
    sums, hits, counts, confusion = _accumulate(networks, split, device, classes, reading)
    metrics = finish(sums, names, classes, str(origin.get("split", "evaluated")))
    unread = len(split) - int(counts.sum())
    record = {
        "format": 1,
        **origin,
        **({"unread": unread} if unread else {}),
        "device": str(device),
        "mixed_precision": networks.precision,
        "peers": [
            {
                "name": name,
                "arch": peers.folders[name].arch,
                "params": parameter_count(module),
                "sha256": peers.folders[name].sha256,
                "test": metrics["peers"][name],
            }
            for name, module in zip(names, networks.modules, strict=True)
        ],
        "ensemble": metrics["ensemble"],
        "agreement": metrics["agreement"],
        "imbalance": metrics["imbalance"],
        "classes": _accuracy_by_class(peers.classes, counts.tolist(), hits, names),
        "most_confused": [] if confusion is None else _most_confused(confusion, peers.classes),
        "versions": versions() | device_versions(device),
    }
    return Evaluation(record, confusion, peers.classes)


def _accumulate(
    networks: Networks, split: Split, device: torch.device, classes: int, reading: Reading
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return sums for ``metrics.finish``, and what is counted.

    That is hits by class [K + 1, C], images by class [C] and the confusion matrix [C, C].
    """
    sums = no_sums(len(networks.names), classes, device)
    hits = torch.zeros(len(networks.names) + 1, classes, dtype=torch.int64)
    counts = torch.zeros(classes, dtype=torch.int64)
    confusion = None
    if classes <= _MOST_CLASSES:
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for images, labels in _batches(split, reading):
        logits = networks.logits(images)
        sums += batch_sums(logits, labels.to(device))
        predicted = best_five(log_posteriors(logits))[1][..., 0].cpu()  # [K + 1, B]
        read = labels >= 0
        counts += torch.bincount(labels[read], minlength=classes)
        for row, best in enumerate(predicted):
            hits[row] += torch.bincount(labels[best == labels], minlength=classes)
        if confusion is not None:
            pairs = labels[read] * classes + predicted[-1, read]
            cells = torch.bincount(pairs, minlength=classes**2)
            confusion += cells.view(classes, classes)
    return sums, hits, counts, confusion


def _batches(split: Split, reading: Reading) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels in batches, and show the progress."""
    parts = zip(_images(split, reading), split.counted().split(BATCH_SIZE), strict=True)
    with tqdm(total=len(split), desc="evaluating", unit=" images", disable=None) as progress:
        for (images, bad), labels in parts:
            yield images, labels.index_fill(0, torch.tensor(bad, dtype=torch.int64), -1)
            progress.update(len(labels))


def _images(split: Split, reading: Reading) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield the images [B, S, S, 3] of each batch, and which of them cannot be read."""
    if isinstance(split.images, Tensor):
        yield from ((images, []) for images in split.images.split(BATCH_SIZE))
        return
    assert isinstance(split.images, Pictures), "those of a data set"
    for read in plain_reads(split.images, BATCH_SIZE, reading.workers):
        if read.damage and not reading.skips:
            raise DamagedImagesError(read.damage)
        reading.damage.extend(read.damage)
        yield read.levels.permute(0, 2, 3, 1), read.bad


def _accuracy_by_class(
    classes: Sequence[str], counts: Sequence[int], hits: Tensor, peers: Sequence[str]
) -> list[dict[str, Any]]:
    names = [*peers, ENSEMBLE]
    return [
        {
            "name": name,
            "n": n,
            "top1": {one: hit / n if n else None for one, hit in zip(names, column, strict=True)},
        }
        for name, n, column in zip(classes, counts, hits.T.tolist(), strict=True)
    ]


def _most_confused(confusion_CC: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return pairs of a class and a wrong prediction, the most frequent first."""
    wrong = confusion_CC.clone().fill_diagonal_(0).flatten()
    cells = wrong.sort(descending=True, stable=True).indices[: 2 * _SHOWN].tolist()
    return [
        {
            "class": classes[cell // len(classes)],
            "taken_for": classes[cell % len(classes)],
            "n": int(wrong[cell]),
        }
        for cell in cells
        if wrong[cell]
    ]


# ---------------------------------------------------------------- files and text


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``FILES`` into a folder, which is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # so that an interruption does not leave files of two evaluations
        (folder / name).unlink(missing_ok=True)
    if evaluation.confusion_CC is not None:
        counts, classes = evaluation.confusion_CC.tolist(), evaluation.classes
        rows = [[name, *line] for name, line in zip(classes, counts, strict=True)]
        with (
            replacing(folder / MATRIX) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            csv.writer(file).writerows([["class \\ taken for", *classes], *rows])
        with replacing(folder / FIGURE) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that the font does not have
            confusion_figure(counts, classes).savefig(temporary, format="png", dpi=150)
    write_json(folder / RECORD, evaluation.record)


def evaluation_text(record: dict[str, Any]) -> str:
    """Return the metrics, the hardest classes and the most confused pairs as tables.

    Args:
        record: the content of evaluation.json.
    """
    parts = [results_table(record)]
    if record["agreement"] is not None:
        agreement = percent(record["agreement"])
        parts.append(f"two networks agree on {agreement}% of the images (mean over pairs)")
    parts.append(_classes_text(record))
    pairs = [
        [printable(one["class"]), printable(one["taken_for"]), one["n"]]
        for one in record["most_confused"][:_SHOWN]
    ]
    if pairs:
        parts.append(table(pairs, ["class", "predicted as", "images"], "simple", left=2))
    return "\n\n".join(parts)


def _classes_text(record: dict[str, Any]) -> str:
    classes = [one for one in record["classes"] if one["n"]]
    classes.sort(key=lambda one: one["top1"][ENSEMBLE])
    names = [peer["name"] for peer in record["peers"]]
    names = [*names, ENSEMBLE] if len(names) > 1 else names
    rows = [
        [printable(one["name"]), one["n"], *(percent(one["top1"][name]) for name in names)]
        for one in classes[:_SHOWN]
    ]
    headers = ["class", "images", *(f"{name} %" for name in names)]
    which = "hardest classes" if len(classes) > _SHOWN else "classes, hardest first"
    return f"top-1 accuracy of the {which}\n\n" + table(rows, headers, "simple", left=1)


def confusion_figure(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> "Figure":
    """Draw a confusion matrix as shares of each class, with names and counts if there is room.

    Args:
        counts: images of each class (rows) by predicted class (columns).
        classes: class names.
    """
    from matplotlib.figure import Figure

    shares = [[count / max(1, sum(line)) for count in line] for line in counts]
    side = min(14.0, 3.5 + 0.3 * len(classes))  # inches
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(classes) <= _MOST_NAMED:
        size = 9 if len(classes) <= 30 else 6
        # Names may be untrusted, and "$" would begin a formula.
        names = [as_utf8(name).replace("$", r"\$")[:24] for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(classes) <= _MOST_COUNTED:
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                if count:
                    ink = "white" if shares[row][column] > 0.5 else "black"
                    axes.text(column, row, str(count), color=ink, **style)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    return figure
