"""Trained networks measured on a data set: as in training, by class, and what is taken for what.

Shape letters: K networks, N images, B of them, C classes. Row K of a table is the ensemble.
"""

import csv
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dml_accel.analysis.plots import confusion, save
from dml_accel.core.config import UsageError
from dml_accel.core.files import write_json
from dml_accel.core.tables import percent, printable, results_table, table
from dml_accel.core.versions import versions
from dml_accel.data.decode import Split
from dml_accel.inference.load import ROWS, Networks, Trained
from dml_accel.models.build import parameter_count
from dml_accel.mutual.metrics import batch_sums, best_five, finish, log_posteriors, no_sums

ENSEMBLE = "ensemble"
FILES = ("evaluation.json", "confusion.csv", "confusion.png")
_SHOWN = 10  # classes and confusions on the screen
_MOST_CLASSES = 2000  # of a table of what is taken for what


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        record: the content of evaluation.json.
        confusion_CC: how many images of each class (rows) were taken for each (columns), by the
            ensemble, or by the only network; None where there are too many classes.
        classes: their names.
    """

    record: dict[str, Any]
    confusion_CC: Tensor | None
    classes: tuple[str, ...]


def by_name(labels: Tensor, theirs: Sequence[str], ours: Sequence[str], where: str) -> Tensor:
    """Return labels of a data set as the numbers that the networks know these classes by.

    Args:
        labels: [N] int64.
        theirs: names of the data set's classes.
        ours: names of the networks' classes; in another order, or where the data set has some of
            them only, they are matched by name.
        where: what to call the networks.

    Raises:
        UsageError: the data set has classes that the networks do not know.
    """
    if tuple(theirs) == tuple(ours):
        return labels
    # Numbers are no names: of fewer, each could mean another class.
    unnamed = all(name.isdecimal() for name in theirs)
    if len(theirs) > len(ours) or (len(theirs) < len(ours) and unnamed):
        raise UsageError(
            f"{where} tells {len(ours)} classes apart; the data set has {len(theirs)}; another "
            "--label-column or --dataset may have those"
        )
    for names in (ours, theirs):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UsageError(
                f"{where}: its classes and those of the data set differ, and cannot be matched by "
                f"name, as several are called {_some(twice)}"
            )
    unknown = [name for name in theirs if name not in set(ours)]
    if unknown:
        raise UsageError(
            f"{where} was trained on other classes: it knows no {_some(unknown)} of the data set, "
            f"which has no {_some([name for name in ours if name not in set(theirs)])}"
        )
    places = {name: place for place, name in enumerate(ours)}
    return torch.tensor([places[name] for name in theirs])[labels]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, map(printable, names[:3]))) + ", ..." * (len(names) > 3)


def evaluate(
    trained: Trained, networks: Networks, split: Split, device: torch.device, about: dict[str, Any]
) -> Evaluation:
    """Measure every network and their ensemble on all images of a split.

    Args:
        trained: what is measured.
        networks: the same, built.
        split: images, and labels as the networks number them.
        device: of the networks.
        about: what else evaluation.json is to tell.
    """
    sums, hits, pairs = _counted(networks, split, device, len(trained.classes))
    names, classes = networks.names, len(trained.classes)
    found = finish(sums, names, classes)
    matrix = pairs.view(classes, classes) if len(pairs) else None
    counts = torch.bincount(split.labels, minlength=classes).tolist()
    record = {
        "format": 1,
        **about,
        "device": str(device),
        "mixed_precision": networks.precision,
        "peers": [
            {
                "name": name,
                "arch": trained.folders[name].arch,
                "params": parameter_count(module),
                "sha256": trained.folders[name].sha256,
                "test": found["peers"][name],
            }
            for name, module in zip(names, networks.modules, strict=True)
        ],
        "ensemble": found["ensemble"],
        "agreement": found["agreement"],
        "classes": _classes(trained.classes, counts, hits, names),
        "most_confused": [] if matrix is None else _most_confused(matrix, trained.classes),
        "versions": versions(),
    }
    return Evaluation(record, matrix, trained.classes)


def _counted(
    networks: Networks, split: Split, device: torch.device, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of metrics, hits of each class [K + 1, C], and confusions, flat [C C]."""
    names = networks.names
    sums = no_sums(len(names), device)
    hits = torch.zeros(len(names) + 1, classes, dtype=torch.int64)
    pairs = torch.zeros(classes**2 if classes <= _MOST_CLASSES else 0, dtype=torch.int64)
    with tqdm(total=len(split), desc="evaluating", unit=" images", disable=None) as progress:
        for images, labels in zip(split.images.split(ROWS), split.labels.split(ROWS), strict=True):
            logits = networks.logits(images)
            sums += batch_sums(logits, labels.to(device))
            best = best_five(log_posteriors(logits))[1][..., 0].cpu()
            for row, guesses in enumerate(best):
                hits[row] += torch.bincount(labels[guesses == labels], minlength=classes)
            if len(pairs):
                pairs += torch.bincount(labels * classes + best[-1], minlength=len(pairs))
            progress.update(len(labels))
    return sums, hits, pairs


def _classes(
    classes: Sequence[str], counts: Sequence[int], hits: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    rows = zip(classes, counts, hits.T.tolist(), strict=True)
    return [
        {
            "name": name,
            "n": n,
            "top1": {
                who: right / n if n else None
                for who, right in zip([*names, ENSEMBLE], of_class, strict=True)
            },
        }
        for name, n, of_class in rows
    ]


def _most_confused(matrix: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pairs of a class and what it is wrongly taken for, most images first."""
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    places = wrong.sort(descending=True, stable=True).indices[: 2 * _SHOWN].tolist()
    return [
        {
            "class": classes[place // len(classes)],
            "taken_for": classes[place % len(classes)],
            "n": int(wrong[place]),
        }
        for place in places
        if wrong[place]
    ]


def write(found: Evaluation, folder: Path) -> None:
    """Write ``FILES`` into a folder, which is made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of another evaluation: one that breaks off leaves no mixture
        (folder / name).unlink(missing_ok=True)
    if found.confusion_CC is not None:
        matrix = found.confusion_CC.tolist()
        rows = [[name, *counts] for name, counts in zip(found.classes, matrix, strict=True)]
        temporary = folder / f".{FILES[1]}.tmp"
        with open(temporary, "w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([["class \\ taken for", *found.classes], *rows])
        temporary.replace(folder / FILES[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the picture's font does not have
            save(confusion(matrix, found.classes), folder / FILES[2])
    write_json(folder / FILES[0], found.record)


def as_text(found: Evaluation) -> str:
    """Return the metrics, the classes and the confusions that matter most as tables."""
    record = found.record
    parts = [results_table(record)]
    if record["agreement"] is not None:
        parts.append(f"two networks agree on {percent(record['agreement'])}% of the images")
    by_class = [one for one in record["classes"] if one["n"]]
    by_class.sort(key=lambda one: one["top1"][ENSEMBLE])
    who = [peer["name"] for peer in record["peers"]]
    who = [*who, ENSEMBLE] if len(who) > 1 else who
    rows = [
        [printable(one["name"]), one["n"], *(percent(one["top1"][name]) for name in who)]
        for one in by_class[:_SHOWN]
    ]
    headers = ["class", "images", *(f"{name} %" for name in who)]
    least = "hardest classes" if len(by_class) > _SHOWN else "classes, hardest first"
    parts.append(f"top-1 of the {least}\n\n" + table(rows, headers, "simple", left=1))
    pairs = [
        [printable(one["class"]), printable(one["taken_for"]), one["n"]]
        for one in record["most_confused"]
    ]
    if pairs:
        headers = ["class", "taken for", "images"]
        parts.append(table(pairs[:_SHOWN], headers, "simple", left=2))
    return "\n\n".join(parts)
