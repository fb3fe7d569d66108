"""The runs of a comparison: every cohort by every method with every seed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dml_accel.analysis.methods import changes_of, refuse
from dml_accel.analysis.published import TABLE_2
from dml_accel.core.config import Config, UsageError
from dml_accel.models import spec as cohort


@dataclass(frozen=True)
class Preset:
    """A named comparison: its cohorts, and what it changes in the default configuration."""

    text: str
    cohorts: tuple[tuple[str, ...], ...]
    changes: dict[str, Any]


PRESETS = {
    "paper-table2": Preset(
        "the six pairs of the paper's Table 2, by its recipe",
        tuple(row.nets for row in TABLE_2),
        {},
    ),
    "laptop": Preset(
        "a pair of resnet8 on 10,000 images for 20 epochs: under an hour on two cores",
        (("resnet8*2",),),
        {"train_limit": 10_000, "epochs": 20, "lr_step": 6, "eval_every": "5ep"},
    ),
}


@dataclass(frozen=True)
class SubRun:
    """One run of a comparison: its place in the table and its folder below the comparison's."""

    cohort: str
    method: str
    seed: int
    folder: str
    config: Config


def plan(
    config: Config, cohorts: Sequence[tuple[str, ...]], methods: Sequence[str], seeds: int
) -> list[SubRun]:
    """Return the runs, seed by seed, so that what is there at any time can be compared.

    Raises:
        UsageError: there is nothing to compare, a cohort cannot be read, or the configuration does
            not go with a method.
    """
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}; it must be at least 1")
    refuse(config, methods)
    labels = [cohort.label([spec.name for spec in cohort.parse(nets)]) for nets in cohorts]
    return [
        SubRun(
            label,
            method,
            seed,
            f"{label + '/' if len(cohorts) > 1 else ''}{method}/seed-{seed}",
            dataclasses.replace(
                config, cohort=nets, seed=seed, output_dir=None, **changes_of(config, method)
            ),
        )
        for nets, label in zip(cohorts, labels, strict=True)
        for seed in range(config.seed, config.seed + seeds)
        for method in dict.fromkeys(methods)
    ]
