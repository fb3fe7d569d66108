"""One run from its configuration to its folder, from top to bottom.

    train      validate, find what to resume from, open the folder, form the process group
    run_one    prepare, take all steps (take_all_steps), write the results (conclude)
    prepare    place, compile and load what this process trains with

``compare`` calls ``run_one`` for each of its runs.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import is_compiled_module

from dml_accel.core.config import Config
from dml_accel.core.errors import OutOfMemoryError, StoppedError, UsageError
from dml_accel.core.host import keep_memory
from dml_accel.core.settings import Settings
from dml_accel.core.tables import printable
from dml_accel.core.versions import Caller
from dml_accel.data import sources
from dml_accel.data.catalogue import folders_read, located
from dml_accel.data.decode import DamagedImagesError
from dml_accel.distributed.children import replace_by
from dml_accel.distributed.launch import (
    Stop,
    check_launch,
    launched_rank,
    own_processes,
    share_cores,
)
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import Ranks
from dml_accel.distributed.processes import Processes, is_out_of_memory
from dml_accel.models.build import parameter_count
from dml_accel.models.optim import has_fused
from dml_accel.models.schedules import what_never_falls
from dml_accel.models.spec import cohort_label, parse_cohort
from dml_accel.training import (
    bad_images,
    checkpoint,
    choosing,
    loop,
    progress,
    resume,
    setup,
    trackers,
)
from dml_accel.training.loop import CheckpointRecord, EvaluationRecord, Record
from dml_accel.training.progress import Display
from dml_accel.training.rates import Schedule
from dml_accel.training.record import Recorder, stopped_early, write_peers
from dml_accel.training.repeat import compare_with_original
from dml_accel.training.resume import Origin
from dml_accel.training.run_folder import CHECKPOINTS, RunFolder, explaining_stop
from dml_accel.training.setup import Checked, Modules, Prepared

_NAMED = 6


def train(
    config: Config, caller: Caller, asked: Settings | None = None
) -> tuple[Path, dict[str, Any] | None]:
    """Train a cohort as ``config`` says, in this process or as one of several.

    Args:
        config: of the run.
        caller: who asks for the run.
        asked: what lies behind ``config``: a recipe, or the run that this one repeats.

    A command may start processes for it, which do all of it: see ``setup.choose_processes``.

    Returns:
        The run folder, in every process once its records are written, and the content of its
        results.json; None in all processes but the first, and if there was nothing to do.

    Raises:
        UsageError: the input does not allow the run; nothing has been written.
        OwnProcessesEndedError: processes that the command has started have done it, or have failed.
        ProcessLostError: another process is gone.
        StoppedError, DivergedError, CheckpointNotWrittenError: see ``run_one``.
    """
    check_launch(config.numerics, config.compute, config.optim, caller.in_python)
    trackers.resolve(config.run.log_with)
    share_cores(config.compute)
    config, first = located(config), launched_rank() == 0
    # What the command finds before it starts processes, it has printed.
    quiet = not first or own_processes() > 1
    names = [spec.name for spec in parse_cohort(config.cohort)]
    in_place = resume.resumes_in_place(config)
    folder = None
    if first:
        where, label = config.run.output_dir, cohort_label(names)
        folder = RunFolder(where, label, in_place, folders_read(config.data))
    config, listed = setup.list_and_size(config, [config.cohort], quiet)
    broke = bad_images.sizes_before(Path(config.run.output_dir or "")) if in_place else None
    source = sources.read(config.data, quiet, listed, config.compute, broke)
    if broke:
        source = bad_images.measured_before(source, Path(config.run.output_dir or ""))
    checked, modules = setup.check(config, source, starts=not resume.has_checkpoint(config))
    count = setup.choose_processes(
        config, checked, modules, caller, resume.recorded_processes(config)
    )
    recorded = None
    if asked is not None:
        silent = not first or count > 1
        recorded = compare_with_original(asked, config, checked, modules, silent)
    work = progress.workload(config, source)
    nothing = resume.nothing_to_do(config, source, folder.path, work.steps) if folder else ""
    if count > 1 and not nothing:
        setup.print_processes(config, count)
        modules.clear()
        del source, checked, listed, folder
        folder_named = config.run.output_dir or "its folder"
        again = caller.again_with(output_dir=folder_named, resume="auto")
        replace_by(count, caller.arguments, again)
    # Elsewhere than in its own folder, a checkpoint is found before anything is written.
    origin = resume.find_origin(config, checked) if folder and not (in_place or nothing) else None
    display = Display(work.total, quiet=not first)
    # From here on files are written, and processes wait for each other.
    with (
        explaining_stop(folder, caller, resume="auto"),
        Stop(caller.in_python) as stop,
        contextlib.closing(display),
        folder if folder and not nothing else contextlib.nullcontext(),
    ):
        if folder and not nothing:
            origin = origin or resume.find_origin(config, checked)
            _refuse_to_shorten(origin, work.steps)
            print(sources.describe(config.data, source), file=sys.stderr, flush=True)
            if origin.path:
                print(f"resuming from {origin.path}", file=sys.stderr, flush=True)
            else:
                folder.print_restart()
        processes = Processes(config.numerics, config.compute)
        stop.listen()
        if folder and not nothing:
            folder.set_running((origin or Origin()).state.get("step", 0))
        with (
            processes.leaving_on_error(caller.in_python),
            processes.watching(folder.fail if folder and not nothing else None),
        ):
            results = None
            if not processes.broadcast_flag(bool(nothing)):
                recipe = asked.recipe if asked else ""
                session = Session(processes, display, stop, caller.text, recipe)
                results = run_one(
                    session,
                    config,
                    checked,
                    modules,
                    folder,
                    origin or Origin(),
                    recorded=recorded,
                )
            # The others wait here for the records, which a caller in Python may read.
            path = Path(processes.broadcast_text(str(folder.path.resolve()) if folder else ""))
            processes.close()
    if folder and nothing:
        folder.set_done()
        print(nothing, file=sys.stderr)
    return folder.path if folder else path, results


def _refuse_to_shorten(origin: Origin, steps: int) -> None:
    if origin.path and origin.state["step"] > steps:
        raise UsageError(
            f"{origin.path} has already taken {origin.state['step']} steps, but the flags ask for "
            f"{steps} in all; raise --epochs or --max-steps"
        )


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Session:
    """What all runs of one command share.

    Attributes:
        processes: those that share the work.
        display: shows the progress.
        stop: requests to stop.
        command: the command line, for the record.
        recipe: the name of the one behind the configuration, for the record; empty for none.
        said: notes that were printed.
    """

    processes: Processes
    display: Display
    stop: Stop
    command: str
    recipe: str = ""
    said: set[str] = field(default_factory=set)


def run_one(
    session: Session,
    config: Config,
    checked: Checked,
    modules: Modules,
    folder: RunFolder | None,
    origin: Origin,
    *,
    label: str = "",
    image_cost: float = 1.0,
    compiled: bool | None = None,
    recorded: Ranks | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train one cohort in an existing process group.

    Args:
        session: what it shares with other runs of the command.
        config: of the run.
        checked: returned by ``check``.
        modules: returned by ``check``; emptied.
        folder: an entered run folder in the first process, None in the others.
        origin: in the first process, what ``find_origin`` returned.
        label: of the run in the display; empty if it is the only one.
        image_cost: see ``workload``.
        compiled: whether to compile, if that was decided for several runs (default: decide).
        recorded: see ``choose_ranks``.
        about: what config.json says of its place in a comparison.

    Returns:
        The content of results.json in the first process.

    Raises:
        OutOfMemoryError: a tensor could not be allocated.
        StoppedError: the run was stopped, and can be resumed from a checkpoint.
        DivergedError: a peer has diverged.
        CheckpointNotWrittenError: a checkpoint could not be written.
        UsageError: also if images cannot be read when they are needed; there is a checkpoint.
        WorkerLostError: a process that reads them is gone.
    """
    processes = session.processes
    if processes.device.type == "cpu" and not config.compute.return_memory:
        keep_memory()
    progress.forget_peak_memory(processes.device)
    path = Path(processes.broadcast_text(str(folder.path.resolve()) if folder else ""))
    origin = origin.agreed(processes)
    ready = prepare(config, checked, modules, processes, path, origin, compiled, recorded)
    recorder = None
    if folder is not None:
        work = progress.workload(config, checked.source, image_cost, ready.start.step)
        session.display.begin(label, work, config.optim.epochs)
        if not label:
            print(_what_starts(ready, work.steps), file=sys.stderr, flush=True)
        # The rate of a stage is that of the comparison, for which the other runs say it.
        for note in _notes(ready, work.steps, about_rates=not about):
            if note not in session.said:  # once, for runs that differ in seed and method only
                print(note, file=sys.stderr, flush=True)
                session.said.add(note)
        if not ready.resumes:
            setup.print_starts(checked)
        recorder = Recorder(folder, ready, session.command, session.recipe, session.display, about)
    resumes = "--resume auto" if not label else f"--output-dir {path.parent}"
    last: EvaluationRecord | None = None
    for record in take_all_steps(ready, recorder, session.stop, resumes):
        last = record if isinstance(record, EvaluationRecord) else last
    assert last is not None, "the last step is evaluated"
    return conclude(ready, recorder, last, label)


def conclude(
    ready: Prepared, recorder: Recorder | None, last: EvaluationRecord, label: str = ""
) -> dict[str, Any] | None:
    """Write the results and the peers of a run that has taken all of its steps.

    Args:
        ready: the run.
        recorder: in the first process.
        last: the last evaluation.
        label: see ``run_one``.

    Returns:
        The content of results.json in the first process.

    Raises:
        OSError: peers could not be written; raised in all processes.
    """
    processes, config = ready.placement.processes, ready.config
    met: list[str] = []
    if config.data.bad_images == "skip":
        met = bad_images.list_met(ready, leads=recorder is not None)
    if recorder:
        recorder.end(last)
        if skipped := bad_images.what_was_skipped(ready, met):
            print(skipped, file=sys.stderr, flush=True)
        if stopped_early(ready, last):
            which = f"{label}: " if label else ""
            print(f"{which}{_why_early(config, last)}", file=sys.stderr, flush=True)
    error = write_peers(ready, last)
    failed = processes.failed_rank(error is not None)  # waits for the files of all peers
    memory = processes.all_reduce_max(progress.peak_memory(processes.device))
    if failed is not None:
        raise error or OSError(f"rank {failed} could not write its peers to {ready.path}")
    return recorder.conclude(last, memory) if recorder else None


def _what_starts(ready: Prepared, steps: int) -> str:
    """Return in one line what is trained, where, how long, and where its records go."""
    processes = ready.placement.processes
    epochs = -(-steps // ready.cohort.steps_per_epoch)
    names = ", ".join(ready.checked.names[:_NAMED]) + ", ..." * (len(ready.checked.names) > _NAMED)
    device = ready.placement.device
    where = device.type if device.type == "cpu" else str(device)
    if processes.world_size > 1:
        where += f" in {processes.world_size} processes"
    if ready.start.step >= steps:
        steps_text = f"all {steps:,} steps are taken"
    elif ready.start.step:
        steps_text = f"steps {ready.start.step + 1:,} to {steps:,}"
    else:
        steps_text = f"{steps:,} step{'s' * (steps > 1)}"
    return (
        f"{names} on {where}: {steps_text}, {epochs} epoch{'s' * (epochs > 1)}; run folder "
        f"{printable(str(ready.path))}"
    )


def _notes(ready: Prepared, steps: int, about_rates: bool) -> list[str]:
    """Return a line for each setting of the optimizers that may not be what was meant."""
    optim, device = ready.config.optim, ready.placement.device
    notes = [what_never_falls(optim, steps, ready.cohort.steps_per_epoch)] * about_rates
    used = {optim.of_peer(name).optimizer for name in ready.checked.names}
    looking = ", ".join(sorted(name for name in used if not has_fused(name)))
    if looking and device.type != "cpu":
        notes.append(
            f"--optimizer {looking}: every step waits for {device} to learn whether the loss is "
            "finite; with sgd, momentum, adam and adamw it does not"
        )
    start = ready.start
    if ready.config.run.keep == "best" and start.step and choosing.BEST not in start.chosen:
        notes.append(
            f"--keep best counts from step {start.step:,} on: the run did not keep the weights of "
            "earlier evaluations"
        )
    return [note for note in notes if note]


def _why_early(config: Config, last: EvaluationRecord) -> str:
    count = config.optim.early_stop
    return (
        f"stopped early after {last.step:,} steps: the mean validation top-1 of the cohort was not "
        f"better in {f'{count} evaluations' if count != 1 else 'an evaluation'}"
    )


def take_all_steps(
    ready: Prepared,
    recorder: Recorder | None,
    stop: Stop,
    resumes: str,
    schedule: Schedule | None = None,
) -> Iterator[Record]:
    """Train to the end, write checkpoints, and yield every record after it was written.

    Args:
        ready: the run.
        recorder: in the first process.
        stop: requests to stop.
        resumes: flags that resume the run, for messages.
        schedule: of the learning rates; None: by the flags.
    """
    config, cohort, saved = ready.config, ready.cohort, ready.start.step
    state = resume.checkpoint_state(config, ready.checked, ready.placement, ready.compiled)
    try:
        with _explaining_out_of_memory(_smaller_steps(config, cohort.one_at_a_time)):
            for record in loop.fit(cohort, ready.images, config.run, ready.start, stop, schedule):
                if isinstance(record, CheckpointRecord):
                    _save(ready, record, state)
                    saved = record.step
                if recorder:
                    recorder.take(record)
                yield record
    except DamagedImagesError as error:  # raised in all processes
        met = bad_images.list_met(ready, leads=recorder is not None)
        raise bad_images.refusal(ready, met, saved, resumes) from error
    except StoppedError as stopped:
        if config.data.bad_images == "skip":
            bad_images.list_met(ready, leads=recorder is not None)
        if recorder:
            recorder.stop(str(stopped))
        ready.placement.processes.barrier()  # a launcher may end all once the first has ended
        raise


def _save(ready: Prepared, record: CheckpointRecord, state: dict[str, Any]) -> None:
    # A checkpoint that a stop asks for while a peer loses steps replaces no sound one.
    keep = ready.config.run.keep_checkpoints if not any(record.lost.values()) else None
    checkpoint.write_together(
        ready.path / CHECKPOINTS,
        record.step,
        ready.cohort.peers,
        state | {"lost": record.lost} | record.chosen,
        keep,
        ready.placement,
    )


@contextlib.contextmanager
def _explaining_out_of_memory(remedy: str) -> Iterator[None]:
    """Say what needs less memory if a tensor cannot be allocated.

    Raises:
        OutOfMemoryError: in place of the error of torch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {remedy}", prints=True) from error


def _smaller_steps(config: Config, one_at_a_time: bool) -> str:
    """Return which flags make a step need less memory.

    Args:
        config: of the run.
        one_at_a_time: whether one network's activations at a time are kept already.
    """
    optim, schedule, ways = config.optim, config.method.schedule, []
    parts, size = 2 * optim.grad_accum, optim.batch_size
    if not one_at_a_time and not schedule.takes_turns:
        ways.append("--low-memory keeps one network's activations at a time")
    if parts <= size and schedule.splits_batches:
        ways.append(f"--grad-accum {parts} uses smaller micro-batches (another result)")
    ways.append(f"a --batch-size below {size} needs less (another result)")
    return "; ".join(ways)


def _fewer_pixels(config: Config, device: torch.device) -> str:
    """Return which flags make the images of a run need less memory of a device."""
    size = config.data.size
    ways = f"an --image-size below {size} or a --train-limit needs less (another result)"
    elsewhere = "" if device.type == "cpu" else "; --cpu trains in the memory of the host"
    return f"all images of a run must fit into the memory of {device}: {ways}{elsewhere}"


# ---------------------------------------------------------------- what a process trains with


def prepare(
    config: Config,
    checked: Checked,
    modules: Modules,
    processes: Processes,
    path: Path,
    origin: Origin,
    compiled: bool | None = None,
    recorded: Ranks | None = None,
) -> Prepared:
    """Place, compile and load what this process trains with; all processes do, together.

    Args:
        config: of the run.
        checked: returned by ``check``.
        modules: returned by ``check``; emptied, so that networks of other processes are freed.
        processes: those that share the work.
        path: of the run folder.
        origin: in every process, what the run starts from.
        compiled: whether to compile, if that was decided for several runs (default: decide).
        recorded: see ``choose_ranks``.

    Raises:
        UsageError: see ``refuse_other_files``, ``with_starts``, ``choose_ranks``, ``load_peers``.
        OutOfMemoryError: a tensor could not be allocated.
    """
    checked, config = resume.with_starts(checked, origin), origin.with_memory_format(config)
    setup.refuse_other_files(checked, processes)
    ranks = origin.ranks(config.compute.placement, processes.world_size)
    ranks = ranks or setup.choose_ranks(config, checked, modules, processes, path, recorded)
    placement = Placement(processes, ranks, config.numerics.batch_norm)
    with _explaining_out_of_memory(_fewer_pixels(config, placement.device)):
        images = setup.prepare_images(
            config, checked.source, placement.device, processes.world_size
        )
    parameters = {name: parameter_count(module) for name, module in modules.items()}
    start = origin.start(path / CHECKPOINTS)
    teaches = config.method.kl_weight > 0 and len(checked.names) + len(checked.frozen) > 1
    one_at_a_time = config.compute.low_memory or not teaches
    with _explaining_out_of_memory(_smaller_steps(config, one_at_a_time)):
        to_compile = origin.compiled(config, processes.world_size)
        if to_compile is None:
            if compiled is None:
                steps = loop.steps_to_take(config.optim, len(images.train)) - start.step
                compiled = setup.compiles(config, checked, modules, placement, steps)
            to_compile = checked.names if compiled else []
        if to_compile and processes.rank == 0:
            _print_compilation(placement, to_compile, config.compute.compile)
        cohort = setup.make_cohort(
            config,
            checked.specs,
            modules,
            images,
            placement,
            frozen=checked.frozen,
            links=checked.links,
            to_compile=to_compile,
        )
    modules.clear()
    resume.load_peers(origin, cohort.peers, processes)
    return Prepared(
        config,
        path,
        checked,
        cohort,
        images,
        placement.union(peer.name for peer in cohort.peers if is_compiled_module(peer.net)),
        parameters,
        start,
        origin.path is not None,
    )


def _print_compilation(placement: Placement, to_compile: Sequence[str], asked: str) -> None:
    shared = [name for name in to_compile if len(placement.ranks[name]) > 1]
    if shared:
        why = "because processes that share a network communicate between its layers"
        print(f"--compile: {', '.join(shared)} run eagerly, {why}", file=sys.stderr)
    if len(shared) < len(to_compile):
        why = "; the run is long enough for it (--compile off for none)" * (asked == "auto")
        print(f"compiling, which takes minutes the first time{why}", file=sys.stderr, flush=True)
