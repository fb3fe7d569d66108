"""The runs of a comparison before they are made: every cohort by every method with every seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml_accel.analysis.methods import IN_STAGES, PUPIL, TEACHERS, changes_of
from dml_accel.analysis.runs import teachers_folder
from dml_accel.analysis.stages import pupil_config, shared_flags, taught_by, teachers_config
from dml_accel.core.config import Config
from dml_accel.core.flags import require
from dml_accel.models.spec import cohort_label, parse_cohort


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        cohort: a short name of the comparison's cohort.
        method: its name in ``METHODS``.
        seed: of the run.
        folder: its path below the comparison's folder.
        config: its configuration, without a folder, and without teachers that are yet to be made.
        teachers: the folder of the run that trains them, below the comparison's; empty for none.
        about: what config.json says of it, if it is a stage of its method; else empty.
    """

    cohort: str
    method: str
    seed: int
    folder: str
    config: Config
    teachers: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_last_stage(self) -> bool:
        """Whether its results are those of the method."""
        return not self.about or self.about["stage"] == PUPIL

    def config_in(self, root: Path) -> Config:
        """Return its configuration in the folder of a comparison, with its teachers."""
        return taught_by(self.config, str(root / self.teachers)) if self.teachers else self.config


def plan_runs(
    config: Config, cohorts: Sequence[tuple[str, ...]], methods: Sequence[str], seeds: int
) -> list[PlannedRun]:
    """Return the runs, seed by seed, so that the finished ones can be compared at any time.

    Args:
        config: what the runs share; its seed is the first one.
        cohorts: each as ``Config.cohort``.
        methods: names in ``METHODS``.
        seeds: how many.

    Raises:
        UsageError: there are no seeds, a cohort cannot be parsed, or a method contradicts the
            configuration.
    """
    require(seeds >= 1, "seeds", seeds, "at least 1")
    labels = [cohort_label([spec.name for spec in parse_cohort(cohort)]) for cohort in cohorts]
    return [
        planned
        for cohort, label in zip(cohorts, labels, strict=True)
        for seed in range(config.seed, config.seed + seeds)
        for method in dict.fromkeys(methods)
        for planned in _runs_of(
            # Without a folder, so that a run is the same wherever the comparison lies.
            config.changed(cohort=cohort, seed=seed, output_dir=None, **changes_of(config, method)),
            label,
            method,
            f"{label + '/' if len(cohorts) > 1 else ''}{method}/seed-{seed}",
        )
    ]


def _runs_of(config: Config, label: str, method: str, folder: str) -> Iterator[PlannedRun]:
    """Yield the run of a method with a seed, or its stages."""
    seed = config.seed
    if method != IN_STAGES:
        yield PlannedRun(label, method, seed, folder, config)
        return
    teachers = str(teachers_folder(Path(folder)))
    for stage, where, needs, its in (
        (TEACHERS, teachers, "", teachers_config(config)),
        (PUPIL, folder, teachers, pupil_config(config)),
    ):
        about = {"method": method, "stage": stage, "shared": shared_flags(config, its)}
        yield PlannedRun(label, method, seed, where, its, needs, about)
