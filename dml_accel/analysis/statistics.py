"""From finished runs to one record: every method over the same seeds, paired with independent.

The seed is the unit. Equal networks of one run are averaged first: they share their data, and
under mutual learning each other, so they are no replicates.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.analysis.intervals import paired_difference, summarise
from dml_accel.analysis.methods import BASELINE
from dml_accel.analysis.published import CIFAR100_TRAINING_IMAGES, published
from dml_accel.analysis.subruns import SubRun
from dml_accel.core.config import Config

METRICS = ("top1", "top5", "nll", "ece")
_NO_RECIPE = frozenset({"cohort", "dataset", "seed", "image_column", "label_column"})
COLUMNS = ("method", "seed", "peer", "arch", *METRICS)


@dataclass(frozen=True)
class Finished:
    """A sub-run that is done, with what its folder holds."""

    sub: SubRun
    results: dict[str, Any]
    description: dict[str, Any]
    seconds: float
    training_seconds: float
    begun_elsewhere: bool

    @property
    def costs(self) -> dict[str, float | None]:
        """Seconds, those of optimizer steps alone, images per second, mean top-1 a second.

        None where a run begun from another's checkpoint does not know all of it.
        """
        peers = self.results["peers"]
        top1 = sum(peer["test"]["top1"] for peer in peers) / len(peers)
        taken = None if self.begun_elsewhere else self.training_seconds
        return {
            "seconds": None if self.begun_elsewhere else self.seconds,
            "training_seconds": taken,
            "images_per_second": self.results["throughput"]["images_per_second"],
            "top1_per_training_second": top1 / taken if taken else None,
        }


def read(root: Path, sub: SubRun) -> Finished:
    """Read a finished sub-run below ``root``."""
    folder = root / sub.folder
    return finished(
        sub,
        json.loads((folder / "results.json").read_text()),
        json.loads((folder / "config.json").read_text()),
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )


def finished(
    sub: SubRun,
    results: dict[str, Any],
    description: dict[str, Any],
    events: Sequence[dict[str, Any]],
) -> Finished:
    """Return a sub-run with the content of its results.json, config.json and metrics.jsonl."""
    return Finished(
        sub,
        results,
        description,
        _seconds(events),
        sum(event["seconds"] for event in events if event["event"] == "step"),
        events[0]["event"] == "resume",
    )


def _seconds(events: Sequence[dict[str, Any]]) -> float:
    """Return how long a run took, without the time between an interruption and its end."""
    pairs = itertools.pairwise(events)
    return sum(b["time"] - a["time"] for a, b in pairs if b["event"] != "resume")


def csv_rows(runs: Iterable[Finished]) -> list[dict[str, Any]]:
    """Return one row per cohort, method, seed and peer; accuracy as a fraction, NLL in nats."""
    return [
        {
            "cohort": run.sub.cohort,
            "method": run.sub.method,
            "seed": run.sub.seed,
            "peer": peer["name"],
            "arch": peer["arch"],
            **{metric: peer["test"][metric] for metric in METRICS},
        }
        for run in runs
        for peer in run.results["peers"]
    ]


def record(
    config: Config,
    plan: Sequence[SubRun],
    runs: Sequence[Finished],
    theirs: bool,
    command: str,
    failed: dict[str, str],
) -> dict[str, Any]:
    """Return the content of a comparison's results.json.

    Args:
        config: what the sub-runs share; cohort, seed, folder and method differ.
        plan: all sub-runs asked for.
        runs: those that are finished.
        theirs: whether the images are CIFAR-100's, for which others report values.
        command: the command line.
        failed: why, for the sub-runs that ended without results.
    """
    done = {run.sub.folder for run in runs}
    methods = list(dict.fromkeys(sub.method for sub in plan))
    return {
        "format": 1,
        "dataset": config.dataset,
        "methods": methods,
        "seeds": sorted({sub.seed for sub in plan}),
        "scaled_down": _scaled_down(config, runs, theirs),
        "recipe": {
            name: value
            for name, (value, _) in config.differences(Config()).items()
            if name not in _NO_RECIPE
        },
        "missing": [sub.folder for sub in plan if sub.folder not in done | failed.keys()],
        "failed": failed,
        "cohorts": [
            _cohort(cohort, methods, [run for run in runs if run.sub.cohort == cohort], theirs)
            for cohort in dict.fromkeys(run.sub.cohort for run in runs)
        ],
        "runs": [_run(run) for run in runs],
        "config": config.as_dict(),
        "command": command,
    }


def _scaled_down(config: Config, runs: Sequence[Finished], theirs: bool) -> list[str]:
    """Say in which ways less was done than in the paper."""
    parts, paper = [], Config()
    images = {run.description["images"]["train"] for run in runs}
    if theirs and images and max(images) < CIFAR100_TRAINING_IMAGES:
        parts.append(f"{max(images):,} of {CIFAR100_TRAINING_IMAGES:,} training images")
    elif config.train_limit is not None:
        parts.append(f"{config.train_limit:,} training images")
    if config.max_steps is not None:
        parts.append(f"{config.max_steps:,} optimizer steps")
    if config.labelled_fraction < 1:
        parts.append(f"labels of {100 * config.labelled_fraction:g}% of them")
    if config.epochs < paper.epochs:
        parts.append(f"{config.epochs} of {paper.epochs} epochs")
    return parts


def _run(run: Finished) -> dict[str, Any]:
    keys = ("ensemble", "agreement", "device", "mixed_precision", "world_size", "versions")
    return {
        **{key: getattr(run.sub, key) for key in ("cohort", "method", "seed", "folder")},
        **{key: run.results[key] for key in keys},
        "seconds": run.seconds,
        "images_per_second": run.results["throughput"]["images_per_second"],
        "commit": run.description["commit"],
        "compiled": run.description.get("compiled", []),
    }


def _cohort(
    cohort: str, methods: Sequence[str], runs: Sequence[Finished], theirs: bool
) -> dict[str, Any]:
    by_method = {
        method: {run.sub.seed: run for run in runs if run.sub.method == method}
        for method in methods
    }
    peers = [(peer["name"], peer["arch"]) for peer in runs[0].results["peers"]]
    nets = [name.rpartition("-")[0] for name, _ in peers]
    groups: list[tuple[str, str, list[str]]] = [
        *(
            ("architecture", arch, [name for name, other in peers if other == arch])
            for arch in dict.fromkeys(arch for _, arch in peers)
        ),
        *(("peer", name, [name]) for name, _ in peers),
        ("cohort", "cohort mean", [name for name, _ in peers]),
        ("ensemble", "ensemble", []),
    ]
    return {
        "cohort": cohort,
        "peers": [{"name": name, "arch": arch} for name, arch in peers],
        "summaries": [
            _summary(method, of, name, members, by_method)
            for of, name, members in groups
            for method in methods
            if by_method[method]
        ],
        "cost": {
            method: {
                name: vars(summarise([run.costs[name] for run in found.values()]))
                for name in next(iter(found.values())).costs
            }
            for method, found in by_method.items()
            if found
        },
        "published": [
            {
                "source": row.source,
                BASELINE: row.independent,
                "mutual": row.mutual,
                "unchecked": sorted(row.unchecked),
            }
            for row in (published(nets) if theirs else [])
        ],
    }


def _summary(
    method: str,
    of: str,
    name: str,
    members: Sequence[str],
    by_method: dict[str, dict[int, Finished]],
) -> dict[str, Any]:
    """Summarise one method for one network, group of networks or the ensemble."""

    def values(method: str, metric: str) -> dict[int, float | None]:
        runs = by_method.get(method, {})
        return {seed: _value(run, members, metric) for seed, run in runs.items()}

    paired = method != BASELINE and by_method.get(BASELINE)
    return {
        "method": method,
        "of": of,
        "name": name,
        **{metric: vars(summarise([*values(method, metric).values()])) for metric in METRICS},
        "difference": {
            metric: vars(paired_difference(values(method, metric), values(BASELINE, metric)))
            for metric in METRICS
        }
        if paired
        else None,
    }


def _value(run: Finished, members: Sequence[str], metric: str) -> float | None:
    """Return the mean of ``members`` in one run; the ensemble's value where there are none."""
    if not members:
        return run.results["ensemble"][metric]
    found = [peer["test"][metric] for peer in run.results["peers"] if peer["name"] in members]
    return None if None in found else sum(found) / len(found)
