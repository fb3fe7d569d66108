"""Comparison of methods over seeds: one ordinary run for each, one table for all.

plan_runs          every cohort by every method with every seed
ComparisonFolder   the folder of these runs and their tables; refuses what must not be mixed in
compare            trains what is not finished, and rewrites the tables after each run

An interrupted comparison is resumed by the same command: finished runs are kept, the others resume
from their newest good checkpoint.
"""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.analysis import plots, statistics
from dml_accel.analysis.methods import changes_of, refuse
from dml_accel.analysis.published import is_cifar100
from dml_accel.analysis.runs import Run, read_run
from dml_accel.analysis.speeds import speed_differences, speed_of
from dml_accel.analysis.tables import comparison_markdown, comparison_title
from dml_accel.core.config import Config, differences_text
from dml_accel.core.errors import DivergedError, UsageError, one_line
from dml_accel.core.files import read_json, write_text
from dml_accel.core.flags import require
from dml_accel.data import sources
from dml_accel.data.catalogue import folders_read, located
from dml_accel.data.selection import training_sizes
from dml_accel.data.sources import Source
from dml_accel.distributed.costs import count
from dml_accel.distributed.launch import (
    Stop,
    check_launch,
    launched_precision,
    launched_processes,
    launched_rank,
    restarts,
    share_cores,
)
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import cohort_label, parse_cohort
from dml_accel.training import trackers
from dml_accel.training.loop import steps_to_take
from dml_accel.training.progress import Display, workload
from dml_accel.training.resume import (
    Origin,
    find_origin,
    has_checkpoint,
    refuse_other_images,
)
from dml_accel.training.run_folder import (
    LockedFolder,
    RunFolder,
    SavedRun,
    explaining_stop,
    refuse_foreign,
    refuse_inside,
)
from dml_accel.training.setup import Checked, check, choose_ranks, list_and_size, seconds_saved
from dml_accel.training.train import Session, run_one

_PLOT = "differences.png"
_TABLES = ("results.json", "results.csv", "results.md", _PLOT)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        cohort: a short name of its cohort.
        method: its name in ``METHODS``.
        seed: of the run.
        folder: its path below the comparison's folder.
        config: its configuration, without a folder.
    """

    cohort: str
    method: str
    seed: int
    folder: str
    config: Config


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
    refuse(config, methods)
    labels = [cohort_label([spec.name for spec in parse_cohort(cohort)]) for cohort in cohorts]
    return [
        PlannedRun(
            label,
            method,
            seed,
            f"{label + '/' if len(cohorts) > 1 else ''}{method}/seed-{seed}",
            # Without a folder, so that a run is the same wherever the comparison lies.
            config.changed(cohort=cohort, seed=seed, output_dir=None, **changes_of(config, method)),
        )
        for cohort, label in zip(cohorts, labels, strict=True)
        for seed in range(config.seed, config.seed + seeds)
        for method in dict.fromkeys(methods)
    ]


def _resuming(planned: PlannedRun, path: Path) -> Config:
    """Return the configuration that starts a run in a folder, or resumes it there."""
    return planned.config.changed(output_dir=str(path), resume="auto")


def _needs_start(planned: PlannedRun, root: str | None) -> bool:
    """Whether a run still starts from its initial weights: it is not done and has no checkpoint."""
    if root is None:
        return True
    path = Path(root) / planned.folder
    return not (SavedRun(path).is_done or has_checkpoint(_resuming(planned, path)))


# ---------------------------------------------------------------- the folder


class ComparisonFolder(LockedFolder):
    """The folder of a comparison: its runs and their tables.

    Args:
        path: the folder; None for a new one.
        plan: the runs.

    Attributes:
        failed: runs that ended without results in this command, and why.

    Raises:
        UsageError: it holds a single run, foreign tables, a comparison with more runs, or runs that
            were started with other flags.
    """

    def __init__(self, path: str | None, plan: Sequence[PlannedRun]) -> None:
        self._plan = plan
        self.failed: dict[str, str] = {}
        label = "-".join(["compare", *dict.fromkeys(planned.cohort for planned in plan)])[:80]
        super().__init__(path, label, folders_read(plan[0].config.data))

    def finished(self) -> list[Run]:
        """Return the finished runs.

        Raises:
            UsageError: one cannot be read, or does not hold what the tables need.
        """
        done = [planned for planned in self._plan if self.saved(planned).is_done]
        runs = [read_run(self.path / one.folder, one.folder, one.method) for one in done]
        for run in runs:
            try:
                statistics.refuse_incomplete(run)
                speed_of(run)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UsageError(
                    f"the finished run in {run.folder} is damaged ({type(error).__name__}: "
                    f"{one_line(error)}): remove its folder to train it again"
                ) from error
        return runs

    def say_what_differs(self) -> None:
        """Warn of finished runs that lack networks, or whose times cannot be compared."""
        runs = self.finished()
        for run in runs:
            lacking = [name for name in run.peers if name not in run.peer_folders]
            if lacking:
                print(
                    f"warning: {run.folder} lacks the networks of {', '.join(lacking)}: its "
                    "results count, but nothing can be predicted with them",
                    file=sys.stderr,
                )
        unfinished = self.unfinished()
        differs = speed_differences(runs, unfinished[0].config if unfinished else None)
        if differs:
            print(
                f"warning: seconds and images/s of these runs cannot be compared: {differs}",
                file=sys.stderr,
                flush=True,
            )

    def set_done(self) -> None:
        """Correct the status of runs that were killed between their results and their status."""
        for planned in self._plan:
            RunFolder(self.path / planned.folder, "", resumes=True, part=True).set_done()

    def saved(self, planned: PlannedRun) -> SavedRun:
        """Return a run as it was left."""
        return SavedRun(self.path / planned.folder)

    def unfinished(self) -> list[PlannedRun]:
        """Return the runs without results."""
        return [planned for planned in self._plan if not self.saved(planned).is_done]

    @property
    def was_stopped(self) -> bool:
        """Whether a launcher has restarted a comparison that was stopped on request."""
        return restarts() > 0 and any(self.saved(one).status == "stopped" for one in self._plan)

    def write_tables(self, config: Config, cifar100: bool, command: str) -> dict[str, Any]:
        """Write the tables of all finished runs; return the content of results.json.

        Args:
            config: what the runs share.
            cifar100: whether the images are CIFAR-100's.
            command: the command line.
        """
        unfinished = [planned.folder for planned in self.unfinished()]
        runs = self.finished()
        record = statistics.comparison_record(
            config,
            runs,
            methods=list(dict.fromkeys(planned.method for planned in self._plan)),
            seeds=list({planned.seed for planned in self._plan}),
            cifar100=cifar100,
            missing=[folder for folder in unfinished if folder not in self.failed],
            failed=self.failed,
            command=command,
        )
        self.write("results.json", record)
        for name, write in (
            ("results.csv", lambda path: write_text(path, self._csv(runs))),
            ("results.md", lambda path: write_text(path, comparison_markdown(record, _PLOT))),
            (
                _PLOT,
                lambda path: plots.save(plots.differences(record, comparison_title(record)), path),
            ),
        ):
            try:
                write(self.path / name)
            except Exception as error:  # the runs to come must not be lost for a table or figure
                reason = f"{type(error).__name__}: {one_line(error)}"
                print(f"warning: {self.path / name} is not written ({reason})", file=sys.stderr)
        return record

    def _csv(self, runs: Sequence[Run]) -> str:
        several = len({planned.cohort for planned in self._plan}) > 1
        columns = ("cohort", *statistics.COLUMNS) if several else statistics.COLUMNS
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(statistics.csv_rows(runs))
        return table.getvalue()

    def _refuse_content(self) -> None:
        for trace in ("config.json", "metrics.jsonl"):
            if (self.path / trace).exists():
                raise UsageError(
                    f"--output-dir {self.path} holds a single run ({trace}); name another folder"
                )
        self._refuse_other_tables()
        has_tables = any((self.path / name).exists() for name in _TABLES)
        if not has_tables and not any((self.path / one.folder).is_dir() for one in self._plan):
            refuse_foreign(self.path, "none of the runs that these flags ask for")
            refuse_inside(self.path, self._images)
        for planned in self._plan:
            RunFolder(self.path / planned.folder, "", resumes=True)  # refuses foreign files
            _refuse_other_flags(self.saved(planned), planned.config)
        self.finished()

    def _refuse_other_tables(self) -> None:
        tables = [name for name in _TABLES if (self.path / name).exists()]
        if not tables:
            return
        try:
            finished = {run["folder"] for run in read_json(self.path / "results.json")["runs"]}
        except (UsageError, KeyError, TypeError) as error:
            raise UsageError(
                f"--output-dir {self.path} holds {', '.join(tables)} of something else; name "
                "another folder"
            ) from error
        more = sorted(finished - {planned.folder for planned in self._plan})
        if more:
            raise UsageError(
                f"--output-dir {self.path} holds a comparison with {', '.join(more[:3])}"
                f"{' and more' if len(more) > 3 else ''}, which these flags leave out: use its "
                "--cohort, --methods and --seeds, or name another folder"
            )


def _refuse_other_flags(saved: SavedRun, config: Config) -> None:
    """Refuse to resume or keep a run that was started with other flags."""
    if not saved.has_description:
        return
    wrong = config.differences(saved.config)
    wrong.pop("dataset", None)  # what counts is what it holds: see ``_check_cohorts``
    wrong.pop("bad_images", None)  # none was met up to now
    wrong.pop("mixed_precision", None)  # if it is not given, the launcher decides
    if saved.is_done:
        results, precision = saved.results, launched_precision(config.numerics)
        if results.get("mixed_precision") != precision:
            wrong["mixed_precision"] = precision, results.get("mixed_precision")
        # Local batch statistics depend on how many processes share a batch.
        world, now = results.get("world_size"), launched_processes()
        if config.numerics.batch_norm == "local" and world != now:
            raise UsageError(
                f"{saved.path} was trained by {world} process(es), and --batch-norm local makes "
                f"the result depend on that; there are {now} now: start {world}, or use a new "
                "--output-dir"
            )
    if wrong:
        raise UsageError(
            f"{saved.path} {differences_text(wrong)}: use the same flags or a new --output-dir"
        )


def _refuse_other_starts(saved: SavedRun, checked: Checked) -> None:
    """Refuse weights to start from that have changed since a run started from them."""
    if not saved.has_description:
        return
    for peer in saved.description.get("peers", []):
        name, start, now = peer["name"], peer.get("start"), checked.starts.get(peer["name"])
        if start and now and start.get("sha256") != now["sha256"]:
            raise UsageError(
                f"{name} of {saved.path} started from other weights than {now['source']} holds "
                "now: restore them or use a new --output-dir"
            )


# ---------------------------------------------------------------- training


def compare(
    config: Config,
    cohorts: Sequence[tuple[str, ...]],
    methods: Sequence[str],
    seeds: int,
    command: str,
    recipe: str = "",
) -> tuple[Path, dict[str, Any]] | None:
    """Train every cohort by every method with every seed; write the tables after each run.

    Args:
        config: what the runs share; its seed is the first one.
        cohorts: each as ``Config.cohort``.
        methods: names in ``METHODS``.
        seeds: how many.
        command: the command line, for the record.
        recipe: the name of the one behind ``config``, for the record; empty for none.

    Returns:
        The folder and the content of its results.json; None in all processes but the first.

    Raises:
        UsageError: the input does not allow one of the runs, or the folder holds runs that were
            started with other flags; nothing has been written.
    """
    check_launch(config.numerics, config.compute, config.optim)
    trackers.resolve(config.run.log_with)
    share_cores(config.compute)
    config, first = located(config), launched_rank() == 0
    plan_runs(config, cohorts, methods, seeds)  # refused before images are looked for
    config, listed = list_and_size(config, cohorts, quiet=not first)
    plan = plan_runs(config, cohorts, methods, seeds)
    folder = ComparisonFolder(config.run.output_dir, plan) if first else None
    source = sources.read(config.data, not first, listed, config.compute)
    image_costs = _check_cohorts(plan, source, config.run.output_dir)
    with explaining_stop(folder), Stop() as stop, folder or contextlib.nullcontext():
        unfinished = plan
        if folder:  # rank 0 decides, and broadcasts what it decides
            unfinished = folder.unfinished()
            folder.set_done()
            print(sources.describe(config.data, source), file=sys.stderr, flush=True)
            folder.say_what_differs()
            print(
                f"comparison: {folder.path}, {len(plan) - len(unfinished)} of {len(plan)} runs are "
                "finished; after an interruption, the same command with this --output-dir resumes "
                "it",
                file=sys.stderr,
            )
        loads = [workload(one.config, source, image_costs[one.cohort]) for one in unfinished]
        work = max(sum(load.total for load in loads), 1.0)
        display = Display(work, quiet=not first, many=True)
        processes = Processes(config.numerics, config.compute)
        stop.listen()
        with contextlib.closing(display), processes.watching():
            record = None
            if not processes.broadcast_flag(bool(folder and folder.was_stopped)):
                session = Session(processes, display, stop, command, recipe)
                trainer = _Trainer(session, config, plan, source, image_costs, folder)
                record = trainer.train_all(unfinished)
            elif folder:
                text = "was stopped on request; the same command resumes it"
                print(f"{folder.path} {text}", file=sys.stderr)
            processes.close()
        return (folder.path, record) if folder and record else None


def _check_cohorts(
    plan: Sequence[PlannedRun], source: Source, root: str | None
) -> dict[str, float]:
    """Check one run of each cohort; return the cost of its forward pass of one image.

    Raises:
        UsageError: see ``training.setup.check``; or saved runs started from other weights.
    """
    costs: dict[str, float] = {}
    for cohort in dict.fromkeys(planned.cohort for planned in plan):
        runs = [planned for planned in plan if planned.cohort == cohort]
        to_start = [planned for planned in runs if _needs_start(planned, root)]
        # Methods and seeds of a cohort have the same networks: one check stands for all. Only the
        # networks of one cohort are in memory at a time.
        config = runs[0].config
        checked, modules = check(config, source, starts=bool(to_start))
        for planned in runs:
            if root and planned not in to_start:
                saved = SavedRun(Path(root) / planned.folder)
                _refuse_other_starts(saved, checked)
                if saved.has_description:
                    refuse_other_images(saved, planned.config, source)
        size = config.data.size
        costs[cohort] = float(sum(count(net, size).macs for net in modules.values()))
        modules.clear()
    return costs


class _Trainer:
    """Trains the runs of a plan, one after the other, in all processes together.

    Args:
        session: what the runs share.
        config: the same; its folder is that of the comparison.
        plan: all runs.
        source: their images.
        image_costs: of a forward pass of one image, by cohort.
        folder: in the first process, entered; None in the others.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        plan: Sequence[PlannedRun],
        source: Source,
        image_costs: Mapping[str, float],
        folder: ComparisonFolder | None,
    ) -> None:
        self._session, self._config, self._plan, self._source = session, config, plan, source
        self._image_costs, self._folder = image_costs, folder
        self._starts: dict[tuple[str, str], str] = {}  # sha256 of weights, by cohort and peer

    def train_all(self, unfinished: Sequence[PlannedRun]) -> dict[str, Any] | None:
        """Train all unfinished runs; one that diverges does not prevent the others.

        Args:
            unfinished: only those of the first process count.

        Returns:
            The content of results.json in the first process.
        """
        processes = self._session.processes
        compiled = self._decide_compilation(unfinished)
        for place, planned in enumerate(self._plan):
            if processes.broadcast_flag(planned not in unfinished):
                continue
            label = f"run {place + 1}/{len(self._plan)}, {planned.folder}"
            try:
                self._train(planned, label, compiled)
            except DivergedError as error:  # raised in all processes
                if self._folder:
                    self._folder.failed[planned.folder] = str(error)
                    self._session.display.end()
            processes.free_networks()
            self._write_tables()  # now, because the next run may be interrupted
        return self._write_tables()

    def _write_tables(self) -> dict[str, Any] | None:
        if self._folder is None:
            return None
        cifar100 = is_cifar100(self._source.classes)
        return self._folder.write_tables(self._config, cifar100, self._session.command)

    def _train(self, planned: PlannedRun, label: str, compiled: bool) -> None:
        folder = None
        if self._folder:
            folder = RunFolder(self._folder.path / planned.folder, "", resumes=True, part=True)
        watching = self._session.processes.watching(folder.fail if folder else None)
        with folder or contextlib.nullcontext(), watching:
            starts = _needs_start(planned, self._config.run.output_dir)
            checked, modules = check(planned.config, self._source, starts)
            self._refuse_changed_starts(planned, checked)
            origin = Origin()
            if folder:
                origin = find_origin(_resuming(planned, folder.path), checked)
                if not origin.path:
                    folder.print_restart()
            run_one(
                self._session,
                planned.config,
                checked,
                modules,
                folder,
                origin,
                label=label,
                image_cost=self._image_costs[planned.cohort],
                compiled=compiled,
            )

    def _refuse_changed_starts(self, planned: PlannedRun, checked: Checked) -> None:
        for name, start in checked.starts.items():
            first = self._starts.setdefault((planned.cohort, name), start["sha256"])
            if first != start["sha256"]:
                raise UsageError(
                    f"{start['source']} has changed since the comparison began: {planned.folder} "
                    "would start from other weights; restore the old ones"
                )

    # ------------------------------------------------------------ compilation

    def _decide_compilation(self, unfinished: Sequence[PlannedRun]) -> bool:
        """Decide once for all runs, so that methods differ in nothing else, and only once ever."""
        compute, processes = self._config.compute, self._session.processes
        if compute.compile != "auto":
            return compute.compile == "on"
        text = ""
        if self._folder:
            before = [_was_compiled(self._folder.saved(planned)) for planned in self._plan]
            decided = [one for one in before if one is not None]
            places = [self._plan.index(planned) for planned in unfinished]
            text = json.dumps([str(self._folder.path.resolve()), decided, places])
        path, decided, places = json.loads(processes.broadcast_text(text))
        if decided:
            return any(decided)
        saved = self._seconds_saved([self._plan[place] for place in places], Path(path))
        return bool(processes.all_reduce_max(saved > 0))

    def _seconds_saved(self, runs: Sequence[PlannedRun], path: Path) -> float:
        """Return the seconds that compilation saves in this process, over all runs."""
        processes, seconds = self._session.processes, 0.0
        for cohort in dict.fromkeys(planned.cohort for planned in runs):
            configs = [planned.config for planned in runs if planned.cohort == cohort]
            trained = [
                training_sizes(len(self._source.train), config.data)[0] for config in configs
            ]
            steps = sum(map(steps_to_take, [config.optim for config in configs], trained))
            checked, modules = check(configs[0], self._source)
            ranks = choose_ranks(configs[0], checked, modules, processes, path)
            placement = Placement(processes, ranks, configs[0].numerics.batch_norm)
            seconds += seconds_saved(configs[0], checked, modules, placement, steps)
            modules.clear()
        return seconds


def _was_compiled(saved: SavedRun) -> bool | None:
    """Return whether the networks of a saved run were compiled; None if it was not started."""
    with contextlib.suppress(UsageError):
        return bool(saved.description.get("compiled"))
    return None
