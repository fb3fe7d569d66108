"""Comparison of methods over seeds: one ordinary run for each, one table for all.

An interrupted comparison is resumed by the same command: finished runs are kept, the others resume
from their newest good checkpoint.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dml_accel.analysis.chosen import choose
from dml_accel.analysis.comparison import ComparisonFolder
from dml_accel.analysis.planned import PlannedRun, plan_runs
from dml_accel.analysis.published import is_cifar100
from dml_accel.core.cohort import words_of
from dml_accel.core.config import Config
from dml_accel.core.errors import DivergedError, UsageError
from dml_accel.core.versions import Caller
from dml_accel.data import sources
from dml_accel.data.catalogue import located
from dml_accel.data.selection import training_sizes
from dml_accel.data.sources import Source
from dml_accel.distributed.children import replace_by
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.launch import (
    Stop,
    check_launch,
    launched_rank,
    own_processes,
    share_cores,
)
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.mutual.teachers import read_teachers
from dml_accel.training import trackers
from dml_accel.training.loop import steps_to_take
from dml_accel.training.progress import Display, workload
from dml_accel.training.resume import (
    Origin,
    find_origin,
    has_checkpoint,
    refuse_other_images,
)
from dml_accel.training.run_folder import RunFolder, SavedRun, explaining_stop
from dml_accel.training.setup import (
    Checked,
    check,
    choose_ranks,
    count_all,
    gains,
    layout_name,
    list_and_size,
    print_processes,
    processes_by_rule,
    processes_without_rule,
    seconds_saved,
)
from dml_accel.training.train import Session, run_one


def compare(
    config: Config,
    cohorts: Sequence[tuple[str, ...]],
    methods: Sequence[str],
    seeds: int,
    caller: Caller,
    recipe: str = "",
) -> tuple[Path, dict[str, Any] | None]:
    """Train every cohort by every method with every seed; write the tables after each run.

    Args:
        config: what the runs share; its seed is the first one.
        cohorts: each as ``Config.cohort``.
        methods: names in ``METHODS``, or ``all`` that can be had.
        seeds: how many.
        caller: who asks for the comparison.
        recipe: the name of the one behind ``config``, for the record; empty for none.

    Returns:
        The folder, in every process once its tables are written, and the content of its
        results.json; None in all processes but the first, and if there was nothing to do.

    Raises:
        UsageError: the input does not allow one of the runs, or the folder holds runs that were
            started with other flags; nothing has been written.
    """
    check_launch(config.numerics, config.compute, config.optim, caller.in_python)
    trackers.resolve(config.run.log_with)
    share_cores(config.compute)
    config, first = located(config), launched_rank() == 0
    # What the command finds before it starts processes, it has printed.
    quiet = not first or own_processes() > 1
    # Refused before images are looked for.
    chosen = choose(config, cohorts, methods)
    plan_runs(config, cohorts, chosen.methods, seeds)
    config, listed = list_and_size(config, cohorts, quiet)
    plan, folder = plan_runs(config, cohorts, chosen.methods, seeds), None
    if first:
        folder = ComparisonFolder(config.run.output_dir, plan, chosen.left_out, chosen.notes)
        for line in () if quiet else chosen.lines:
            print(line, file=sys.stderr, flush=True)
    source = sources.read(config.data, quiet, listed, config.compute)
    costs = _check_cohorts(plan, source, config.run.output_dir)
    count = _choose_processes(config, plan, source, costs, folder, caller)
    if count > 1:
        print_processes(config, count)
        again = caller.again_with(output_dir=config.run.output_dir or "its folder")
        del source, listed, folder
        replace_by(count, caller.arguments, again)
    operations = {
        cohort: {name: cost.macs for name, cost in found.items()} for cohort, found in costs.items()
    }
    with (
        explaining_stop(folder, caller),
        Stop(caller.in_python) as stop,
        folder or contextlib.nullcontext(),
    ):
        unfinished = plan
        if folder:  # rank 0 decides, and broadcasts what it decides
            unfinished = folder.unfinished()
            folder.set_done()
            print(sources.describe(config.data, source), file=sys.stderr, flush=True)
            folder.say_what_differs()
            again = caller.again_with(output_dir=str(folder.path))
            print(
                f"comparison: {folder.path}, {len(plan) - len(unfinished)} of {len(plan)} runs are "
                f"finished; after an interruption, {again} resumes it",
                file=sys.stderr,
            )
        loads = [workload(one.config, source, _image_cost(one, operations)) for one in unfinished]
        work = max(sum(load.total for load in loads), 1.0)
        display = Display(work, quiet=not first, many=True)
        processes = Processes(config.numerics, config.compute)
        stop.listen()
        with (
            contextlib.closing(display),
            processes.leaving_on_error(caller.in_python),
            processes.watching(),
        ):
            record = None
            if not processes.broadcast_flag(bool(folder and folder.was_stopped)):
                session = Session(processes, display, stop, caller.text, recipe)
                trainer = _Trainer(session, config, plan, source, operations, folder)
                record = trainer.train_all(unfinished)
            elif folder:
                again = caller.again_with(output_dir=str(folder.path))
                print(f"{folder.path} was stopped on request; {again} resumes it", file=sys.stderr)
            # The others wait here for the tables, which a caller in Python may read.
            path = Path(processes.broadcast_text(str(folder.path.resolve()) if folder else ""))
            processes.close()
        return folder.path if folder else path, record


def _resuming(config: Config, path: Path) -> Config:
    """Return the configuration that starts a run in a folder, or resumes it there."""
    return config.changed(output_dir=str(path), resume="auto")


def _needs_start(planned: PlannedRun, root: str | None) -> bool:
    """Whether a run still starts from its initial weights: it is not done and has no checkpoint."""
    if root is None:
        return True
    path = Path(root) / planned.folder
    return not (SavedRun(path).is_done or has_checkpoint(_resuming(planned.config, path)))


# ---------------------------------------------------------------- checks

_Costs = dict[str, dict[str, Cost]]  # by cohort and peer
_Operations = Mapping[str, Mapping[str, float]]  # of a forward pass of one image, by cohort, peer


def _check_cohorts(plan: Sequence[PlannedRun], source: Source, root: str | None) -> _Costs:
    """Check one run of each cohort; return what each of its networks costs.

    Raises:
        UsageError: see ``training.setup.check``; or saved runs started from other weights, images
            or teachers.
    """
    costs: _Costs = {}
    for cohort in dict.fromkeys(planned.cohort for planned in plan):
        runs = [planned for planned in plan if planned.cohort == cohort]
        to_start = [planned for planned in runs if _needs_start(planned, root)]
        # Methods and seeds of a cohort have the same networks: one check stands for all. Only the
        # networks of one cohort are in memory at a time.
        config = runs[0].config
        checked, modules = check(config, source, starts=bool(to_start))
        for planned in runs:
            _refuse_other_teachers(planned, Path(root) if root else None, source)
            if root and planned not in to_start:
                saved = SavedRun(Path(root) / planned.folder)
                _refuse_other_starts(saved, checked)
                if saved.has_description:
                    refuse_other_images(saved, planned.config, source)
        costs[cohort] = count_all(config, modules)
        modules.clear()
    return costs


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


def _refuse_other_teachers(planned: PlannedRun, root: Path | None, source: Source) -> None:
    """Refuse teachers that cannot be read, or have changed since a run learned from them.

    Args:
        planned: the run.
        root: the folder of the comparison; None for a new one.
        source: the images.
    """
    if root is None:
        read_teachers(planned.config.method.frozen_peers, source.classes, planned.config.data.size)
        return
    config, saved = planned.config_in(root), SavedRun(root / planned.folder)
    paths = config.method.frozen_peers
    if not paths or (planned.teachers and not SavedRun(root / planned.teachers).is_done):
        return  # those that are yet to be trained are compared when the run resumes
    try:
        now = read_teachers(paths, source.classes, config.data.size)
    except UsageError:
        if saved.is_done:
            return
        raise
    if not saved.has_description:
        return
    then = saved.description.get("teachers", {}).get("frozen", {})
    if [one["sha256"] for one in then.values()] != [one.sha256 for one in now.values()]:
        raise UsageError(
            f"{saved.path} learned from other teachers than {', '.join(paths)} hold now: restore "
            "them, or remove its folder to train it again"
        )


def _choose_processes(
    config: Config,
    plan: Sequence[PlannedRun],
    source: Source,
    costs: _Costs,
    folder: ComparisonFolder | None,
    caller: Caller,
) -> int:
    """Return how many processes the command starts for all runs; 1: it trains in this one.

    A comparison that has begun keeps its number, so that its runs differ in nothing else.

    Args:
        config: what the runs share.
        plan: all runs.
        source: their images.
        costs: of the networks.
        folder: in the first process, not entered.
        caller: who asks for the comparison.
    """
    unfinished = folder.unfinished() if folder else []
    if not unfinished:
        return 1
    before = [saved for saved in map(folder.saved, plan) if saved.has_description] if folder else []
    recorded = None
    if before:
        text = _resolved(before[0], "processes")
        recorded = int(text) if text.isdecimal() and int(text) else 1
    fixed = processes_without_rule(config, caller, recorded)
    if fixed is not None:
        return fixed
    counts = []
    for cohort in dict.fromkeys(planned.cohort for planned in unfinished):
        configs = [planned.config for planned in unfinished if planned.cohort == cohort]
        # Peers that take turns are in every process, and nobody trains faster with parts of images.
        if any(one.method.schedule.takes_turns for one in configs):
            return 1
        steps = _all_steps(configs, source)
        counts.append(processes_by_rule(configs[0], source, costs[cohort], steps))
    return min(counts)


def _all_steps(configs: Sequence[Config], source: Source) -> int:
    """Return the optimizer steps of several runs."""
    trained = [training_sizes(len(source.train), config.data)[0] for config in configs]
    return sum(map(steps_to_take, [config.optim for config in configs], trained))


def _image_cost(planned: PlannedRun, operations: _Operations) -> float:
    """Return the operations of a forward pass of one image through all networks of a run."""
    macs = operations[planned.cohort]
    own = sum(macs[name] for word in words_of(planned.config.cohort) for name in word.peers)
    # A step passes three times through its own networks and once through its teachers.
    return own + sum(macs.values()) / 3 if planned.teachers else own


# ---------------------------------------------------------------- training


class _Trainer:
    """Trains the runs of a plan, one after the other, in all processes together.

    Args:
        session: what the runs share.
        config: the same; its folder is that of the comparison.
        plan: all runs.
        source: their images.
        operations: of each network of a cohort, see ``_image_cost``.
        folder: in the first process, entered; None in the others.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        plan: Sequence[PlannedRun],
        source: Source,
        operations: _Operations,
        folder: ComparisonFolder | None,
    ) -> None:
        self._session, self._config, self._plan, self._source = session, config, plan, source
        self._operations, self._folder = operations, folder
        self._starts: dict[tuple[str, str], str] = {}  # sha256 of weights, by cohort and peer

    def train_all(self, unfinished: Sequence[PlannedRun]) -> dict[str, Any] | None:
        """Train all unfinished runs; one that diverges does not prevent the others.

        Args:
            unfinished: only those of the first process count.

        Returns:
            The content of results.json in the first process.
        """
        processes, folder = self._session.processes, self._folder
        root = Path(processes.broadcast_text(str(folder.path.resolve()) if folder else ""))
        compiled, layouts = self._decide_compilation(unfinished), self._earlier_memory_formats()
        for place, planned in enumerate(self._plan):
            if folder and planned.teachers in folder.failed:
                folder.failed[planned.folder] = "its teachers could not be trained"
            skips = planned not in unfinished or (folder and planned.folder in folder.failed)
            if processes.broadcast_flag(bool(skips)):
                continue
            label = f"run {place + 1}/{len(self._plan)}, {planned.folder}"
            config = planned.config_in(root)
            layout = layouts.get(" ".join(planned.cohort), "")
            if layout not in ("", layout_name(config, processes.device)):
                config = config.changed(memory_format=layout)
            try:
                self._train(planned, config, label, compiled)
            except DivergedError as error:  # raised in all processes
                if folder:
                    folder.failed[planned.folder] = str(error)
                    self._session.display.end()
            processes.free_networks()
            self._write_tables()  # now, because the next run may be interrupted
        return self._write_tables()

    def _write_tables(self) -> dict[str, Any] | None:
        if self._folder is None:
            return None
        cifar100 = is_cifar100(self._source.classes)
        return self._folder.write_tables(self._config, cifar100, self._session.command)

    def _train(self, planned: PlannedRun, config: Config, label: str, compiled: bool) -> None:
        folder = None
        if self._folder:
            folder = RunFolder(self._folder.path / planned.folder, "", resumes=True, part=True)
        watching = self._session.processes.watching(folder.fail if folder else None)
        with folder or contextlib.nullcontext(), watching:
            starts = _needs_start(planned, self._config.run.output_dir)
            checked, modules = check(config, self._source, starts)
            self._refuse_changed_starts(planned, checked)
            origin = Origin()
            if folder:
                origin = find_origin(_resuming(config, folder.path), checked)
                if not origin.path:
                    folder.print_restart()
            run_one(
                self._session,
                config,
                checked,
                modules,
                folder,
                origin,
                label=label,
                image_cost=_image_cost(planned, self._operations),
                compiled=compiled,
                about=planned.about,
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
        return gains(saved, processes)

    def _earlier_memory_formats(self) -> dict[str, str]:
        """Return the memory format of runs that were started before, by cohort.

        Earlier versions had another default, and methods are to differ in nothing else.
        """
        found: dict[str, str] = {}
        if self._folder and self._config.compute.memory_format is None:
            for planned in self._plan:
                layout = _resolved(self._folder.saved(planned), "memory_format")
                found |= {" ".join(planned.cohort): layout} if layout else {}
        recorded: dict[str, str] = json.loads(
            self._session.processes.broadcast_text(json.dumps(found))
        )
        return recorded

    def _seconds_saved(self, runs: Sequence[PlannedRun], path: Path) -> float:
        """Return the seconds that compilation saves in this process, over all runs."""
        processes, seconds = self._session.processes, 0.0
        for cohort in dict.fromkeys(planned.config.cohort for planned in runs):
            configs = [planned.config for planned in runs if planned.config.cohort == cohort]
            steps = _all_steps(configs, self._source)
            checked, modules = check(configs[0], self._source)
            ranks = choose_ranks(configs[0], checked, modules, processes, path)
            placement = Placement(processes, ranks, configs[0].numerics.batch_norm)
            seconds += seconds_saved(configs[0], checked, modules, placement, steps)
            modules.clear()
        return seconds


def _resolved(saved: SavedRun, name: str) -> str:
    """Return what a flag of a saved run came to; empty if the run does not say it."""
    with contextlib.suppress(UsageError):
        found = saved.description.get("resolved")
        return str(found.get(name, "")) if isinstance(found, dict) else ""
    return ""


def _was_compiled(saved: SavedRun) -> bool | None:
    """Return whether the networks of a saved run were compiled; None if it was not started."""
    with contextlib.suppress(UsageError):
        return bool(saved.description.get("compiled"))
    return None
