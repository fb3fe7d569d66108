"""One run from its configuration to its folder: everything is checked, then trained, then kept."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import is_compiled_module
from safetensors import SafetensorError
from torch import nn

from dml_accel import cohort, data, frozen, sources, trackers
from dml_accel.checking import (
    Checked,
    agreed_compilation,
    agreed_ranks,
    check,
    refuse_other_files,
    say_starts,
)
from dml_accel.cohort import Peer, PeerSpec, parameter_count
from dml_accel.config import Config, UsageError
from dml_accel.data import Data
from dml_accel.engine import (
    CheckpointRecord,
    EvaluationRecord,
    Record,
    StepRecord,
    evaluation_follows,
    fit,
    steps_to_take,
)
from dml_accel.export import write_peer
from dml_accel.files import write_text
from dml_accel.launching import Stop, StoppedError, check_launch, launched_rank, share_cores
from dml_accel.placement import Placement
from dml_accel.planning import predict, this_machine
from dml_accel.processes import Processes, remedy_of_short_memory
from dml_accel.progress import (
    Display,
    Window,
    Windows,
    Workload,
    device_memory,
    forget_peak_memory,
)
from dml_accel.provenance import commit, versions
from dml_accel.report import results_markdown
from dml_accel.resuming import (
    CHECKPOINTS,
    Origin,
    continues_in_place,
    description,
    find,
    has_checkpoint,
    keep,
    load,
    nothing_to_do,
    with_starts,
)
from dml_accel.runfolder import RunFolder, remedy_of_a_stop
from dml_accel.schedules import takes_turns
from dml_accel.sources import Source
from dml_accel.teaching import Teaching
from dml_accel.trackers import Trackers


def train(config: Config, command: str) -> tuple[Path, dict[str, Any]] | None:
    """Train a cohort as ``config`` says, in this process or as one of several.

    Args:
        config: the run.
        command: the command line that asked for it, for the record.

    Returns:
        The run folder and the content of its results.json; None in all processes but the first,
        which alone writes.

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
    origin = origin.agreed(processes)
    checked = with_starts(checked, origin)
    refuse_other_files(checked, processes)
    ranks = origin.ranks(config, processes.world_size)
    placement = Placement(
        config, processes, ranks or agreed_ranks(config, checked, processes, path)
    )
    images = data.prepare(checked.source, config, placement.device)
    teachers = frozen.prepare(checked.frozen, images, config, placement)
    teaching = Teaching(config, checked.names, list(checked.frozen), checked.links)
    parameters = {name: parameter_count(module) for name, module in checked.modules.items()}
    start = origin.start(path / CHECKPOINTS)
    alone = takes_turns(config, teaching)
    with remedy_of_short_memory(config, alone):
        known = origin.compiled(config, processes.world_size)
        if known is None:
            if compiles is None:
                steps = steps_to_take(config, len(images.train)) - start.step
                compiles = agreed_compilation(config, checked, placement, steps)
            known = checked.names if compiles else []
        peers = _peers(checked, config, placement, known)
    compiled = placement.named(peer.name for peer in peers if is_compiled_module(peer.net))
    load(origin, peers, processes)
    windows = Windows(placement.names, len(images.train) // config.batch_size)
    recorder = None
    if folder is not None:
        work = workload(config, checked.source, image_cost, start.step)
        display.begin(label, work, config.epochs, _images_of_a_step(config, placement))
        step = start.step
        folder.begin(
            step if origin.path else None, evaluation_follows(config, len(images.train), step)
        )
        about = _description(config, checked, placement, images, command)
        folder.write("config.json", about | {"compiled": compiled})
        if not origin.path:
            say_starts(checked)
        told = Trackers(
            trackers.check(config.log_with),
            folder.path,
            config.as_dict(),
            step if origin.path else None,
        )
        folder.tell(told)
        folder.event("resume" if origin.path else "start", step, step // windows.steps_per_epoch)
        recorder = _Recorder(folder, windows, display)
    state = description(config, checked, placement, compiled)
    try:
        records = fit(peers, images, config, placement, start, stop, teaching, teachers)
        with remedy_of_short_memory(config, alone):
            for record in records:
                if isinstance(record, CheckpointRecord):
                    keep(path / CHECKPOINTS, record, peers, state, config, placement)
                if recorder:
                    recorder.take(record)
                last = record
    except StoppedError as stopped:
        if folder:
            folder.status("stopped", str(stopped))
        processes.wait()  # a launcher may end all when the first has ended
        raise
    assert isinstance(last, EvaluationRecord), "fit ends with an evaluation"
    if folder:
        folder.event("end", last.step, last.epoch)
        display.end()
    archs = {name: folder.arch for name, folder in checked.frozen.items()}
    error = _write_peers(path, peers, last, images, config, placement, teaching, archs)
    # Also the wait for the files of all peers.
    unwritten = processes.largest(0 if error is None else 1 + processes.rank)
    memory = processes.largest(device_memory(placement.device))
    if unwritten:
        raise error or OSError(f"rank {unwritten - 1} could not write its peers below {path}")
    results = None
    if folder is not None:
        results = _results(checked, parameters, last, windows, config, placement, memory)
        text = results_markdown(results, config.as_dict(), command)
        write_text(folder.path / "results.md", text)
        told.text("results", text, last.step)
        folder.write("results.json", results)  # the last: it says that the run is done
    return results


def workload(config: Config, source: Source, image_cost: float = 1.0, taken: int = 0) -> Workload:
    """Return what a run costs, in forward passes of an image times ``image_cost``.

    Backward passes count twice. Where evaluations follow the clock, the last one alone is counted.

    Args:
        config: the run.
        source: its images.
        image_cost: cost of a forward pass of one image through all networks.
        taken: optimizer steps that are behind it.
    """
    trained, held = data.check_sizes(source, config)
    steps = steps_to_take(config, trained)
    period = config.eval_interval.steps(trained // config.batch_size)
    evaluations = -(-steps // period) if period else 1
    evaluated = held + len(source.test)
    peers = len(cohort.parse(config.cohort))
    # Forward passes by all networks together, and a backward pass that costs two of them.
    passes = {"simultaneous": 3.0, "sequential": 3 + (peers - 1) / peers, "official": 2.0 + peers}
    step = passes[config.update] * config.batch_size * image_cost
    return Workload(steps, step, evaluations, evaluated * image_cost, taken)


def _images_of_a_step(config: Config, placement: Placement) -> int:
    """Images of an optimizer step, each counted once however many peers see it."""
    return config.batch_size * (len(placement.names) if config.update == "official" else 1)


def _peers(
    checked: Checked, config: Config, placement: Placement, compiled: Sequence[str]
) -> list[Peer]:
    """Return the peers that are trained here, their networks taken out of ``checked``.

    Args:
        checked: the networks.
        config: the run's.
        placement: whose they are.
        compiled: names of those to compile, where one process trains them alone.
    """
    if compiled and placement.processes.rank == 0:
        shared = [name for name in compiled if len(placement.ranks[name]) > 1]
        if shared:
            why = "processes that share a network exchange between its layers"
            print(f"--compile: {', '.join(shared)} run eagerly, as {why}", file=sys.stderr)
        if len(shared) < len(compiled):
            print("compiling, which takes minutes the first time", file=sys.stderr, flush=True)
    mine = [spec for spec in checked.specs if spec.name in placement.mine]
    peers = [
        _peer(spec, checked.modules[spec.name], config, placement, spec.name in compiled)
        for spec in mine
    ]
    checked.modules.clear()
    return peers


def _peer(
    spec: PeerSpec, module: nn.Module, config: Config, placement: Placement, compiled: bool
) -> Peer:
    net = placement.prepare(module, spec.name, compiled)
    keeps = is_compiled_module(net) and config.compile_mode != "default"
    sgd = cohort.optimizer(module, config)
    return Peer(spec, module, net, sgd, placement.scaler(), keeps)


def _sent(config: Config, checked: Checked, placement: Placement) -> list[float]:
    """Return the payload bytes that each process sends in a step."""
    if placement.processes.world_size == 1:
        return [0.0]
    classes = len(checked.source.classes)
    return predict(placement.ranks, checked.costs, config, classes, this_machine()).sent


def _write_peers(
    path: Path,
    peers: list[Peer],
    last: EvaluationRecord,
    images: Data,
    config: Config,
    placement: Placement,
    teaching: Teaching,
    archs: dict[str, str],
) -> OSError | None:
    """Write the folders of the peers that this process leads; return what prevented it."""
    for peer in peers:
        if not placement.leads(peer.name):
            continue
        try:
            write_peer(
                path / "peers" / peer.name,
                peer,
                last.test["peers"][peer.name],
                classes=images.classes,
                normalisation=images.normalisation,
                image_size=config.image_size,
                dataset=config.dataset,
                steps=last.step,
                taught_by=[archs.get(name, name) for name in teaching.teachers_of(peer.name)],
                distilled=set(teaching.teachers_of(peer.name)) <= archs.keys(),
            )
        except OSError as error:
            return error
        except SafetensorError as error:  # the format's own, a full disk among them
            return OSError(f"{path / 'peers' / peer.name} cannot be written: {error}")
    return None


def _description(
    config: Config, checked: Checked, placement: Placement, images: Data, command: str
) -> dict[str, Any]:
    return {
        "format": 1,
        "config": config.as_dict(),
        "peers": [
            {"name": spec.name, "arch": spec.arch}
            | ({"start": checked.starts[spec.name]} if spec.name in checked.starts else {})
            for spec in checked.specs
        ],
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "teachers": checked.teachers,
        "classes": len(images.classes),
        "images": {"train": len(images.train), "test": len(images.test)},
        "versions": versions(),
        "command": command,
        "commit": commit(),
    }


class _Recorder:
    """Turns the records of training into lines of metrics.jsonl and news for the display."""

    def __init__(self, folder: RunFolder, windows: Windows, display: Display) -> None:
        self._folder, self._windows, self._display = folder, windows, display

    def take(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            window = self._windows.add(record)
            self._display.step(window)
            if window is not None:
                self._event(window)
            return
        if isinstance(record, EvaluationRecord):
            scores = {"test": record.test, "val": record.val}
            self._folder.event("eval", record.step, record.epoch, **scores)
            self._display.evaluation(record)
        self._windows.restart_clock()

    def _event(self, window: Window) -> None:
        self._folder.event(
            "step",
            window.last.step,
            window.last.epoch,
            lr=window.last.lr,
            steps=window.steps,
            seconds=round(window.seconds, 6),
            peers=window.losses,
            **({"skipped": window.skipped} if window.skipped else {}),
        )


def _results(
    checked: Checked,
    parameters: dict[str, int],
    last: EvaluationRecord,
    windows: Windows,
    config: Config,
    placement: Placement,
    memory: int,
) -> dict[str, Any]:
    return {
        "format": 1,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": last.step,
        "device": str(placement.device),
        "mixed_precision": placement.processes.mixed_precision,
        "world_size": placement.processes.world_size,
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "peers": [
            {
                "name": spec.name,
                "arch": spec.arch,
                "params": parameters[spec.name],
                "test": last.test["peers"][spec.name],
                "val": last.val["peers"][spec.name] if last.val else None,
            }
            for spec in checked.specs
        ],
        "ensemble": last.test["ensemble"],
        "agreement": last.test["agreement"],
        "throughput": windows.throughput(_images_of_a_step(config, placement)),
        "peak_memory_bytes": memory,
        "versions": versions(),
        "sent_bytes_per_step": _sent(config, checked, placement),
    }
