"""One run from its configuration to its folder: everything is checked, then trained, then kept."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, UsageError
from dml_accel.data import sources
from dml_accel.distributed.launch import (
    Stop,
    StoppedError,
    check_launch,
    launched_rank,
    share_cores,
)
from dml_accel.distributed.processes import Processes, remedy_of_short_memory
from dml_accel.models import spec as cohort
from dml_accel.training.keeping import description, keep
from dml_accel.training.loop import CheckpointRecord, EvaluationRecord, fit
from dml_accel.training.origin import Origin
from dml_accel.training.preparing import Prepared, prepare
from dml_accel.training.progress import Display, device_memory, forget_peak_memory
from dml_accel.training.record import Recorder, write_peers
from dml_accel.training.resume import (
    CHECKPOINTS,
    continues_in_place,
    find,
    has_checkpoint,
    nothing_to_do,
)
from dml_accel.training.run_folder import RunFolder, remedy_of_a_stop
from dml_accel.training.setup import Checked, check, say_starts
from dml_accel.training.workload import images_of_a_step, workload


def train(config: Config, command: str) -> tuple[Path, dict[str, Any]] | None:
    """Train a cohort as ``config`` says, in this process or as one of several.

    Args:
        config: the run.
        command: the command line that asked for it, for the record.

    Returns:
        The run folder and the content of its results.json; None in all processes but the first,
        which writes the records.

    Raises:
        UsageError: the input does not allow the run; nothing has been written then.
        ProcessLostError: another process is gone.
        StoppedError, DivergedError, NotKeptError: see ``run``.
    """
    check_launch(config)
    share_cores(config)
    names = [spec.name for spec in cohort.parse(config.cohort)]
    speaks = launched_rank() == 0
    goes_on = continues_in_place(config)
    folder = RunFolder(config.output_dir, cohort.label(names), goes_on) if speaks else None
    source = sources.read(config, quiet=not speaks)
    checked = check(config, source, begins=not has_checkpoint(config))
    work = workload(config, source)
    nothing = nothing_to_do(config, folder.path, work.steps) if folder else ""
    origin = find(config, checked) if folder and not (goes_on or nothing) else None
    display = Display(work.total, quiet=not speaks)
    # From here on something is written, and processes wait for each other.
    with (
        remedy_of_a_stop(folder, "--resume auto"),
        Stop() as stop,
        contextlib.closing(display),
        folder if folder and not nothing else contextlib.nullcontext(),
    ):
        if folder and not nothing:
            origin = origin or find(config, checked)
            _refuse_to_go_back(origin, work.steps)
            folder.take_up(origin.state.get("step", 0))
            if origin.path:
                print(f"going on from {origin.path}", file=sys.stderr, flush=True)
        processes = Processes(config)
        with processes.watching():
            results = None
            if not processes.agreed(bool(nothing)):
                results = run(
                    config, checked, processes, folder, command, display, stop, origin or Origin()
                )
            processes.close()
    if nothing:
        print(nothing, file=sys.stderr)
    return (folder.path, results) if folder and results else None


def _refuse_to_go_back(origin: Origin, steps: int) -> None:
    if origin.path and origin.state["step"] > steps:
        raise UsageError(
            f"{origin.path} has {origin.state['step']} steps behind it, and the flags ask for "
            f"{steps} in all; raise --epochs or --max-steps"
        )


def run(
    config: Config,
    checked: Checked,
    processes: Processes,
    folder: RunFolder | None,
    command: str,
    display: Display,
    stop: Stop,
    origin: Origin,
    label: str = "",
    image_cost: float = 1.0,
    compiles: bool | None = None,
) -> dict[str, Any] | None:
    """Train one cohort with processes that are already together.

    Args:
        config: the run.
        checked: what ``check`` returned for it.
        processes: those that share the work.
        folder: an entered run folder in the first process, None in the others.
        command: the command line, for the record.
        display: where progress is shown.
        stop: what asks the run to stop.
        origin: in the first process, what ``resuming.find`` returned.
        label: what the display calls the run.
        image_cost: see ``workload``.
        compiles: ``checking.agreed_compilation``'s decision for several runs (default: decide).

    Returns:
        The content of results.json in the first process.

    Raises:
        MemoryShortError: there was no memory for a tensor.
        StoppedError: a stop was asked for, and the run can go on from a checkpoint.
        DivergedError: a peer is lost.
        NotKeptError: a checkpoint could not be written.
    """
    forget_peak_memory(processes.device)
    path = Path(processes.text_of_first(str(folder.path.resolve()) if folder else ""))
    ready = prepare(config, checked, processes, path, origin.agreed(processes), compiles)
    recorder = None
    if folder is not None:
        work = workload(config, checked.source, image_cost, ready.start.step)
        display.begin(label, work, config.epochs, images_of_a_step(config))
        if not ready.goes_on:
            say_starts(ready.checked)
        recorder = Recorder(folder, ready, command, display)
    last = _take_all_steps(ready, recorder, stop)
    if recorder:
        recorder.end(last)
    error = write_peers(ready, last)
    # Also the wait for the files of all peers.
    unwritten = processes.largest(0 if error is None else 1 + processes.rank)
    memory = processes.largest(device_memory(processes.device))
    if unwritten:
        raise error or OSError(f"rank {unwritten - 1} could not write its peers below {path}")
    return recorder.conclude(last, memory) if recorder else None


def _take_all_steps(ready: Prepared, recorder: Recorder | None, stop: Stop) -> EvaluationRecord:
    """Train to the end, keeping checkpoints; return the last evaluation."""
    state = description(ready.config, ready.checked, ready.placement, ready.compiled)
    records = fit(
        ready.peers,
        ready.images,
        ready.config,
        ready.placement,
        ready.start,
        stop,
        ready.teaching,
        ready.teachers,
    )
    try:
        with remedy_of_short_memory(ready.config, ready.one_at_a_time):
            for record in records:
                if isinstance(record, CheckpointRecord):
                    root = ready.path / CHECKPOINTS
                    keep(root, record, ready.peers, state, ready.config, ready.placement)
                if recorder:
                    recorder.take(record)
                last = record
    except StoppedError as stopped:
        if recorder:
            recorder.stop(str(stopped))
        ready.placement.processes.wait()  # a launcher may end all when the first has ended
        raise
    assert isinstance(last, EvaluationRecord), "fit ends with an evaluation"
    return last
