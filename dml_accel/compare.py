"""Several methods over several seeds: one ordinary run for each, one table for all.

A comparison that was interrupted goes on where it stopped: finished runs are kept, the others are
started over.
"""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel import cohort, comparison, plots, sources
from dml_accel.comparison import SubRun
from dml_accel.config import Config, UsageError
from dml_accel.costs import count
from dml_accel.export import write_text
from dml_accel.processes import (
    Processes,
    check_launch,
    launched_rank,
    stopping_on_sigterm,
)
from dml_accel.progress import Display
from dml_accel.published import TABLE_2
from dml_accel.report import comparison_markdown, comparison_title
from dml_accel.runfolder import LockedFolder, RunFolder, is_done, saved_config
from dml_accel.sources import Source
from dml_accel.training import Checked, check, run, workload

# What each method changes in the configuration that the methods share.
METHODS: dict[str, dict[str, Any]] = {"independent": {"kl_weight": 0.0}, "mutual": {}}
_PLOT = "differences.png"


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


class _ComparisonFolder(LockedFolder):
    def _refuse_content(self) -> None:
        for trace in ("config.json", "metrics.jsonl"):
            if (self.path / trace).exists():
                raise UsageError(
                    f"--output-dir {self.path} holds a single run ({trace}); name another folder"
                )


def compare(
    config: Config,
    cohorts: Sequence[tuple[str, ...]],
    methods: Sequence[str],
    seeds: int,
    command: str,
) -> tuple[Path, dict[str, Any]] | None:
    """Train every cohort by every method with every seed; write the tables after each run.

    Args:
        config: what the runs share; its seed is the first one.
        cohorts: each as ``Config.cohort``.
        methods: names in ``METHODS``.
        seeds: how many.
        command: the command line, for the record.

    Returns:
        The folder and the content of its results.json; None in all processes but the first.

    Raises:
        UsageError: the input does not allow one of the runs, or a finished run in the folder was
            made by another configuration; nothing has been written then.
    """
    check_launch(config)
    plan = _plan(config, cohorts, methods, seeds)
    label = "-".join(["compare", *dict.fromkeys(sub.cohort for sub in plan)])[:80]
    speaks = launched_rank() == 0
    root = _ComparisonFolder(config.output_dir, label) if speaks else None
    if root:
        for sub in plan:
            _refuse_another_configuration(root.path, sub)
    source = sources.read(config, quiet=not speaks)
    costs = _costs(plan, source)
    unfinished = [sub for sub in plan if not (root and is_done(root.path / sub.folder))]
    work = sum(workload(sub.config, source, costs[sub.cohort]).total for sub in unfinished)
    display = Display(max(work, 1.0), quiet=not speaks, many=True)
    with stopping_on_sigterm(), root or contextlib.nullcontext(), contextlib.closing(display):
        processes = Processes(config)
        with processes.watching():
            for place, sub in enumerate(plan):
                if processes.agreed(sub not in unfinished):
                    continue
                folder = RunFolder(root.path / sub.folder, "", starts_over=True) if root else None
                title = f"run {place + 1}/{len(plan)}, {sub.folder}"
                with folder or contextlib.nullcontext():
                    checked = check(sub.config, source)
                    cost = costs[sub.cohort]
                    run(sub.config, checked, processes, folder, command, display, title, cost)
                if root:
                    _write(root, config, plan, source, command)
            processes.close()
        return (root.path, _write(root, config, plan, source, command)) if root else None


def _plan(
    config: Config, cohorts: Sequence[tuple[str, ...]], methods: Sequence[str], seeds: int
) -> list[SubRun]:
    """Return the runs, seed by seed, so that what is there at any time can be compared.

    Raises:
        UsageError: there is nothing to compare.
    """
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}; it must be at least 1")
    if config.kl_weight == 0 and "mutual" in methods:
        raise UsageError("--kl-weight 0 makes mutual the same as independent; leave it out")
    labels = [cohort.label([spec.name for spec in cohort.parse(nets)]) for nets in cohorts]
    return [
        SubRun(
            label,
            method,
            seed,
            f"{label + '/' if len(cohorts) > 1 else ''}{method}/seed-{seed}",
            dataclasses.replace(config, cohort=nets, seed=seed, output_dir=None, **METHODS[method]),
        )
        for nets, label in zip(cohorts, labels, strict=True)
        for seed in range(config.seed, config.seed + seeds)
        for method in dict.fromkeys(methods)
    ]


def _refuse_another_configuration(root: Path, sub: SubRun) -> None:
    if not is_done(root / sub.folder):
        return
    found = saved_config(root / sub.folder)
    wrong = sub.config.differences(found)
    if wrong:
        texts = [f"{name} {theirs} and not {ours}" for name, (ours, theirs) in wrong.items()]
        raise UsageError(
            f"{root / sub.folder} was made with {', '.join(texts)}; name another --output-dir or "
            "repeat its flags"
        )


def _costs(plan: Sequence[SubRun], source: Source) -> dict[str, float]:
    """Check one run of each cohort; return the cost of its forward pass of one image."""
    checked: dict[str, Checked] = {}
    for sub in plan:
        if sub.cohort not in checked:
            checked[sub.cohort] = check(sub.config, source)
    size = plan[0].config.image_size
    return {
        name: float(sum(count(net, size).macs for net in found.modules.values()))
        for name, found in checked.items()
    }


def _write(
    root: LockedFolder, config: Config, plan: Sequence[SubRun], source: Source, command: str
) -> dict[str, Any]:
    """Write the tables of what is finished; return the content of results.json."""
    runs = [comparison.read(root.path, sub) for sub in plan if is_done(root.path / sub.folder)]
    record = comparison.record(config, plan, runs, source.classes, command)
    root.write("results.json", record)
    several = len({sub.cohort for sub in plan}) > 1
    columns = ("cohort", *comparison.COLUMNS) if several else comparison.COLUMNS
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison.csv_rows(runs))
    write_text(root.path / "results.csv", table.getvalue())
    write_text(root.path / "results.md", comparison_markdown(record, _PLOT))
    plots.save(plots.differences(record, comparison_title(record)), root.path / _PLOT)
    return record
