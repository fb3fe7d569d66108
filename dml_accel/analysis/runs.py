"""Finished runs: found below folders, read, and grouped by what can be compared."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.analysis.methods import MAY_DIFFER, METHODS, PUPIL, TEACHERS, method_of
from dml_accel.core.cohort import words_of
from dml_accel.core.config import Config, saved_config
from dml_accel.core.errors import UsageError
from dml_accel.models.peer_folder import find_peers
from dml_accel.models.spec import cohort_label, parse_cohort
from dml_accel.training.run_folder import SavedRun


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: its path.
        name: of the folder, in tables.
        method: how it was trained, as ``method_of`` or a comparison calls it.
        config: its configuration; of a run that is a stage of a method, with the cohort and the
            epochs of the other methods of its comparison.
        description: the content of config.json.
        results: the content of results.json.
        events: the records of metrics.jsonl.
        earlier: the runs that trained what it learned from, as stages of the same method.
    """

    folder: Path
    name: str
    method: str
    config: Config
    description: dict[str, Any]
    results: dict[str, Any]
    events: list[dict[str, Any]]
    earlier: tuple["Run", ...] = ()

    @property
    def peers(self) -> list[str]:
        """The names of its peers."""
        return [peer["name"] for peer in self.description["peers"]]

    @property
    def is_own(self) -> bool:
        """Whether its networks are modules that a caller of ``learn`` has named."""
        return "learn" in self.description

    @property
    def whole_cohort(self) -> list[str]:
        """The names of all peers of its cohort; a method of stages may train only some of them."""
        if self.is_own:
            return self.peers
        return [name for word in words_of(self.config.cohort) for name in word.peers]

    @property
    def nets(self) -> list[str]:
        """The network of each peer."""
        if self.is_own:
            return self.peers
        return [name.rpartition("-")[0] for name in self.peers]

    @property
    def cohort(self) -> str:
        """A short name of its cohort."""
        return cohort_label(self.whole_cohort)

    @property
    def peer_folders(self) -> dict[str, Path]:
        """The folders of its peers, by name; without those whose weights are missing."""
        with contextlib.suppress(UsageError):
            folders = {path.name: path for path in find_peers(self.folder)}
            return {name: folders[name] for name in self.peers if name in folders}
        return {}

    @property
    def seconds(self) -> float:
        """The time of all stages, without pauses between an interruption and the resume."""
        pairs = itertools.pairwise(self.events)
        own = sum(b["time"] - a["time"] for a, b in pairs if b["event"] != "resume")
        return own + sum(run.seconds for run in self.earlier)

    @property
    def training_seconds(self) -> float:
        """The time of the optimizer steps of all stages."""
        own = sum(event["seconds"] for event in self.events if event["event"] == "step")
        return own + sum(run.training_seconds for run in self.earlier)

    @property
    def began_elsewhere(self) -> bool:
        """Whether it began with the checkpoint of another run, whose records it does not have."""
        return bool(self.events[0]["event"] == "resume")

    @property
    def stage_is_gone(self) -> bool:
        """Whether the run that trained its teachers, as a stage of its method, was removed."""
        stage = (self.description.get("comparison") or {}).get("stage")
        return stage == PUPIL and not self.earlier

    @property
    def last_metrics(self) -> dict[str, Any]:
        """The test metrics of its last evaluation."""
        return list(self.evaluations())[-1][1]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch: older records count epochs from 0, newer ones from 1."""
        # The images that were used, which the flags may have limited.
        return int(self.description["images"]["train"]) // self.config.optim.batch_size

    def evaluations(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield the epoch, counted from 0 at the start, and the test metrics of each evaluation."""
        for event in self.events:
            if event["event"] == "eval":
                yield event["step"] / self.steps_per_epoch, event["test"]


def read_run(folder: Path, name: str | None = None, method: str | None = None) -> Run:
    """Read a finished run.

    Args:
        folder: its path.
        name: of the folder, in tables (default: its path).
        method: what to call its method (default: as its configuration implies).

    Raises:
        UsageError: a file of the run cannot be read.
    """
    saved = SavedRun(folder)
    name = str(folder) if name is None else name
    try:
        description = saved.description
        config, stage = saved_config(description), description.get("comparison") or {}
        teachers = description.get("teachers", {}).get("frozen", {})
        config = config.changed(**stage.get("shared", {}))
        peers = len(description["peers"])
        method = method or method_of(config, peers, teachers, stage.get("method", ""))
        earlier = _earlier_runs(folder, name, stage, method)
        return Run(folder, name, method, config, description, saved.results, saved.events, earlier)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the run in {folder} cannot be read: {error}") from error


def _earlier_runs(
    folder: Path, name: str, stage: Mapping[str, Any], method: str
) -> tuple[Run, ...]:
    """Return the stages before this one; without those that are gone, see ``stage_is_gone``."""
    teachers = teachers_folder(folder)
    if not stage or stage["stage"] == TEACHERS or not SavedRun(teachers).is_done:
        return ()
    return (read_run(teachers, str(teachers_folder(Path(name))), method),)


def teachers_folder(folder: Path) -> Path:
    """Return where the teachers of a run were trained, if it is the last stage of a method."""
    return folder.with_name(f"{folder.name}-{TEACHERS}")


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the finished runs in or below some folders, in the order of their paths.

    Raises:
        UsageError: there is no finished run, or a run cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        for folder in sorted(file.parent for file in path.rglob("metrics.jsonl")):
            saved = SavedRun(folder)
            if not saved.is_done:
                print(f"skipped: the run in {folder} is {saved.state}", file=sys.stderr)
            elif _trained_teachers(saved):
                text = f"the run in {folder} trained the teachers of a method, and counts there"
                print(f"left out: {text}", file=sys.stderr)
            elif folder.resolve() not in runs:
                runs[folder.resolve()] = read_run(folder)
    if not runs:
        raise UsageError(
            f"there is no finished run in or below {', '.join(map(str, paths))}: it would have "
            "results.json beside metrics.jsonl"
        )
    return list(runs.values())


def _trained_teachers(saved: SavedRun) -> bool:
    stage = saved.description.get("comparison")
    return isinstance(stage, dict) and stage.get("stage") == TEACHERS


# ---------------------------------------------------------------- groups


def group_comparable(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in method and seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        # The order of a cohort does not change its results.
        groups.setdefault(json.dumps([sorted(networks_of(run)), recipe_of(run)]), []).append(run)
    return list(groups.values())


def group_by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method, in the order of ``METHODS``: independent training first."""
    order = {name: place for place, name in enumerate(METHODS)}

    def place(method: str) -> tuple[int, str]:
        return order.get(method.partition(",")[0], len(order)), method

    methods = sorted({run.method for run in runs}, key=place)
    return {method: [run for run in runs if run.method == method] for method in methods}


def networks_of(run: Run) -> list[str]:
    """Return the network of each peer with its arguments and the weights that it started from."""
    if run.is_own:
        return [f"{peer['name']}: {peer.get('arch')}" for peer in run.description["peers"]]
    return [
        f"{spec.arch}{sorted(spec.arguments.items())}"
        + ("" if spec.start is None else f" from {spec.start or 'the hub'}")
        for spec in parse_cohort(run.config.cohort)
    ]


def recipe_of(run: Run) -> list[Any]:
    """Return what comparable runs have in common beside their networks."""
    changed = run.config.differences(Config())
    recipe = {name: mine for name, (mine, _) in changed.items() if name not in MAY_DIFFER}
    recipe["dataset"] = Path(run.config.data.dataset).name  # the same set may lie elsewhere
    images = run.description["images"]
    return [sorted(recipe.items()), images["train"], images["test"]]
