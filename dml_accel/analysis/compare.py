"""Several methods over several seeds: one ordinary run for each, one table for all.

A comparison that was interrupted goes on where it stopped: finished runs are kept, the others go on
from their newest good checkpoint.
"""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dml_accel.analysis import plots, subruns
from dml_accel.analysis import statistics as comparison
from dml_accel.analysis.comparison_folder import (
    PLOT,
    ComparisonFolder,
    begins,
    in_place,
    refuse_another_configuration,
    refuse_other_starts,
    was_stopped,
)
from dml_accel.analysis.published import is_cifar100
from dml_accel.analysis.subruns import SubRun
from dml_accel.analysis.tables import comparison_markdown, comparison_title
from dml_accel.core.config import Config, UsageError
from dml_accel.core.files import write_text
from dml_accel.data import sources
from dml_accel.data.batches import check_sizes
from dml_accel.data.sources import Source
from dml_accel.distributed.costs import count
from dml_accel.distributed.launch import Stop, check_launch, launched_rank, share_cores
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.training.agenda import DivergedError, steps_to_take
from dml_accel.training.origin import Origin
from dml_accel.training.progress import Display
from dml_accel.training.resume import find
from dml_accel.training.run_folder import RunFolder, remedy_of_a_stop
from dml_accel.training.saved import is_done, saved_description
from dml_accel.training.setup import Checked, agreed_ranks, check, saved_here
from dml_accel.training.train import run
from dml_accel.training.workload import workload


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
    share_cores(config)
    plan = subruns.plan(config, cohorts, methods, seeds)
    label = "-".join(["compare", *dict.fromkeys(sub.cohort for sub in plan)])[:80]
    speaks = launched_rank() == 0
    root = ComparisonFolder(config.output_dir, label, plan) if speaks else None
    if root:
        for sub in plan:
            refuse_another_configuration(root.path, sub)
            RunFolder(root.path / sub.folder, "", goes_on=True)  # refuses what is no run
    source = sources.read(config, quiet=not speaks)
    made = _Comparison(config, plan, source, _costs(plan, source, config.output_dir), root, command)
    with remedy_of_a_stop(root), Stop() as stop, root or contextlib.nullcontext():
        unfinished = made.unfinished()
        display = Display(made.work(unfinished), quiet=not speaks, many=True)
        processes = Processes(config)
        with contextlib.closing(display), processes.watching():
            stopped = processes.agreed(bool(root and was_stopped(root.path, plan)))
            if not stopped:
                made.run_all(unfinished, processes, display, stop)
            processes.close()
        return (root.path, made.write()) if root and not stopped else None


class _Comparison:
    """The runs of a plan, one after the other, and the tables of those that are finished."""

    def __init__(
        self,
        config: Config,
        plan: Sequence[SubRun],
        source: Source,
        costs: dict[str, float],
        root: ComparisonFolder | None,
        command: str,
    ) -> None:
        self._config, self._plan, self._source, self._costs = config, plan, source, costs
        self._root, self._command = root, command
        self._failed: dict[str, str] = {}
        self._starts: dict[tuple[str, str], str] = {}  # sha256 by cohort and peer

    def unfinished(self) -> list[SubRun]:
        """Return the runs to make, which the first process alone knows; say how many there are."""
        root, plan = self._root, list(self._plan)
        if root is None:
            return plan
        found = [sub for sub in plan if not is_done(root.path / sub.folder)]
        print(
            f"comparison: {root.path}, {len(plan) - len(found)} of {len(plan)} runs are finished; "
            "if this is interrupted, the same command with this --output-dir goes on",
            file=sys.stderr,
        )
        return found

    def work(self, subs: Sequence[SubRun]) -> float:
        """Return what some runs cost."""
        loads = (workload(sub.config, self._source, self._costs[sub.cohort]) for sub in subs)
        return max(sum(load.total for load in loads), 1.0)

    def run_all(
        self, unfinished: Sequence[SubRun], processes: Processes, display: Display, stop: Stop
    ) -> None:
        """Make the runs; one that diverges does not hold up the others."""
        compiles = self._config.compile == "on"
        if self._config.compile == "auto":
            compiles = _compiles(self._plan, unfinished, self._source, processes, self._root)
        for place, sub in enumerate(self._plan):
            if processes.agreed(sub not in unfinished):
                continue
            title = f"run {place + 1}/{len(self._plan)}, {sub.folder}"
            try:
                self._run(sub, title, compiles, processes, display, stop)
            except DivergedError as error:  # in all processes alike
                self._failed[sub.folder] = str(error)
                if self._root:
                    display.end()
            processes.release_networks()
            if self._root:
                self.write()

    def _run(
        self,
        sub: SubRun,
        title: str,
        compiles: bool,
        processes: Processes,
        display: Display,
        stop: Stop,
    ) -> None:
        folder = None
        if self._root:
            folder = RunFolder(self._root.path / sub.folder, "", goes_on=True)
        with folder or contextlib.nullcontext():
            checked = check(sub.config, self._source, begins(sub, self._config.output_dir))
            self._refuse_changed_starts(sub, checked)
            origin = find(in_place(sub, folder.path), checked) if folder else Origin()
            run(
                sub.config,
                checked,
                processes,
                folder,
                self._command,
                display,
                stop,
                origin,
                title,
                self._costs[sub.cohort],
                compiles,
            )

    def _refuse_changed_starts(self, sub: SubRun, checked: Checked) -> None:
        for name, start in checked.starts.items():
            if self._starts.setdefault((sub.cohort, name), start["sha256"]) != start["sha256"]:
                raise UsageError(
                    f"{start['source']} has changed since the comparison began: {sub.folder} would "
                    "start from other weights; bring the old ones back"
                )

    def write(self) -> dict[str, Any]:
        """Write the tables of what is finished; return the content of results.json."""
        root, plan = self._root, self._plan
        assert root, "the first process writes"
        runs = [comparison.read(root.path, sub) for sub in plan if is_done(root.path / sub.folder)]
        theirs = is_cifar100(self._source.classes)
        record = comparison.record(self._config, plan, runs, theirs, self._command, self._failed)
        root.write("results.json", record)
        several = len({sub.cohort for sub in plan}) > 1
        columns = ("cohort", *comparison.COLUMNS) if several else comparison.COLUMNS
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(comparison.csv_rows(runs))
        write_text(root.path / "results.csv", table.getvalue())
        write_text(root.path / "results.md", comparison_markdown(record, PLOT))
        plots.save(plots.differences(record, comparison_title(record)), root.path / PLOT)
        return record


def _compiles(
    plan: Sequence[SubRun],
    unfinished: Sequence[SubRun],
    source: Source,
    processes: Processes,
    root: ComparisonFolder | None,
) -> bool:
    """Decide once for all runs, so that methods differ in nothing else; what was decided stays."""
    text = ""
    if root:
        known = [_known_to_compile(root.path / sub.folder) for sub in plan]
        said = [one for one in known if one is not None]
        text = json.dumps([str(root.path.resolve()), said, [plan.index(s) for s in unfinished]])
    path, said, places = json.loads(processes.text_of_first(text))
    if said:
        return any(said)
    saved = 0.0
    for cohort_ in dict.fromkeys(plan[place].cohort for place in places):
        subs = [plan[place] for place in places if plan[place].cohort == cohort_]
        steps = sum(steps_to_take(s.config, check_sizes(source, s.config)[0]) for s in subs)
        config = subs[0].config
        checked = check(config, source)
        ranks = agreed_ranks(config, checked, processes, Path(path))
        saved += saved_here(config, checked, Placement(config, processes, ranks), steps)
    return bool(processes.largest(saved > 0))


def _known_to_compile(folder: Path) -> bool | None:
    with contextlib.suppress(UsageError):
        return bool(saved_description(folder).get("compiled"))
    return None


def _costs(plan: Sequence[SubRun], source: Source, root: str | None) -> dict[str, float]:
    """Check one run of each cohort; return the cost of its forward pass of one image.

    Raises:
        UsageError: see ``check``; runs that are there started from other weights.
    """
    costs: dict[str, float] = {}
    for cohort_ in dict.fromkeys(sub.cohort for sub in plan):
        subs = [sub for sub in plan if sub.cohort == cohort_]
        begin = [sub for sub in subs if begins(sub, root)]
        config = subs[0].config
        checked = check(config, source, bool(begin))  # networks of one cohort at a time
        for sub in subs:
            if root and sub not in begin:
                refuse_other_starts(Path(root) / sub.folder, checked)
        nets = checked.modules.values()
        costs[cohort_] = float(sum(count(net, config.image_size).macs for net in nets))
    return costs
