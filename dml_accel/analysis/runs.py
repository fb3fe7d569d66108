"""Finished runs: found, grouped by what may be compared, followed over epochs."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.analysis.intervals import Summary, summarise
from dml_accel.analysis.methods import MAY_DIFFER, method_of
from dml_accel.core.config import Config, UsageError
from dml_accel.models import spec as cohort
from dml_accel.training.saved import state_of


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: where it lies.
        config: its configuration.
        description: the content of config.json.
        results: the content of results.json.
        events: the records of metrics.jsonl.
    """

    folder: Path
    config: Config
    description: dict[str, Any]
    results: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def method(self) -> str:
        """What the comparison command calls the way it was trained."""
        teachers = self.description.get("teachers", {}).get("frozen", {})
        return method_of(self.config, len(self.nets), teachers)

    @property
    def cohort(self) -> str:
        """Short name of its cohort."""
        return cohort.label([peer["name"] for peer in self.description["peers"]])

    @property
    def nets(self) -> list[str]:
        """The network of each peer."""
        return [peer["name"].rpartition("-")[0] for peer in self.description["peers"]]

    @property
    def ends_with(self) -> dict[str, Any]:
        """The test metrics of its last evaluation."""
        return list(self.evaluations())[-1][1]

    def evaluations(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield the epoch, counted from the start, and the test metrics of each evaluation."""
        per_epoch = self.description["images"]["train"] // self.config.batch_size
        for event in self.events:
            if event["event"] == "eval":
                yield event["step"] / per_epoch, event["test"]


def find(paths: Sequence[Path]) -> list[Run]:
    """Return the finished runs in or below some folders, in the order of their paths.

    Raises:
        UsageError: a folder does not exist, there is no finished run, or one cannot be read.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; name one of runs")
        for folder in sorted(file.parent for file in path.rglob("metrics.jsonl")):
            if not (folder / "results.json").is_file():
                print(f"left out: the run in {folder} is {state_of(folder)}", file=sys.stderr)
            elif folder.resolve() not in found:
                found[folder.resolve()] = _read(folder)
    if not found:
        raise UsageError(
            f"there is no finished run in or below {', '.join(map(str, paths))}: one has "
            "results.json beside metrics.jsonl"
        )
    return list(found.values())


def _read(folder: Path) -> Run:
    try:
        description = json.loads((folder / "config.json").read_text())
        return Run(
            folder,
            Config.from_dict(description["config"]),
            description,
            json.loads((folder / "results.json").read_text()),
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the run in {folder} cannot be read: {error}") from error


def comparable(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ in method and seed alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([sorted(nets_of(run)), recipe_of(run)]), []).append(run)
    return list(groups.values())


def nets_of(run: Run) -> list[str]:
    """Return the networks of a cohort with their arguments."""
    specs = cohort.parse(run.config.cohort)
    return [
        f"{spec.arch}{sorted(spec.arguments.items())}"
        + ("" if spec.start is None else f" from {spec.start or 'the hub'}")
        for spec in specs
    ]


def recipe_of(run: Run) -> list[Any]:
    """Return what runs of one comparison share beside their networks."""
    changed = run.config.differences(Config())
    recipe = {name: mine for name, (mine, _) in changed.items() if name not in MAY_DIFFER}
    recipe["dataset"] = Path(run.config.dataset).name
    images = run.description["images"]
    return [sorted(recipe.items()), images["train"], images["test"]]


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method, independent training first."""
    methods = sorted({run.method for run in runs}, key=lambda m: (m != "independent", m))
    return {method: [run for run in runs if run.method == method] for method in methods}


Point = tuple[float, Summary]


def over_epochs(
    runs: Sequence[Run], value: Callable[[dict[str, Any]], float | None]
) -> list[Point]:
    """Return the mean and interval over seeds of a value of the test metrics, by epoch.

    Epochs that not all runs were evaluated at are left out.
    """
    curves = [dict(run.evaluations()) for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(epoch, summarise([value(curve[epoch]) for curve in curves])) for epoch in shared]


def loss_over_epochs(runs: Sequence[Run], part: str) -> list[Point]:
    """Return the mean and interval over seeds of a part of the training loss, by epoch."""
    curves = []
    for run in runs:
        sums: dict[int, list[float]] = {}
        for event in run.events:
            if event["event"] == "step":
                values = [peer[part] for peer in event["peers"].values() if peer[part] is not None]
                if values:
                    mean = sum(values) / len(values)
                    weight, total = sums.get(event["epoch"], [0.0, 0.0])
                    sums[event["epoch"]] = [
                        weight + event["steps"],
                        total + event["steps"] * mean,
                    ]
        curves.append({epoch + 1: total / weight for epoch, (weight, total) in sums.items()})
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(epoch, summarise([curve[epoch] for curve in curves])) for epoch in shared]
