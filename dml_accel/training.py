"""One run from its configuration to its folder: everything is checked, then trained, then kept."""

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from dml_accel import cohort, data, sources
from dml_accel.checking import Checked, agreed_ranks, check
from dml_accel.cohort import Peer, PeerSpec, parameter_count
from dml_accel.config import Config
from dml_accel.data import Data
from dml_accel.engine import EvaluationRecord, fit, steps_to_take
from dml_accel.export import write_peer, write_text
from dml_accel.launching import check_launch, launched_rank, stopping_on_sigterm
from dml_accel.placement import Placement
from dml_accel.planning import predict, this_machine
from dml_accel.processes import Processes
from dml_accel.progress import Display, Windows, Workload, device_memory, forget_peak_memory
from dml_accel.provenance import commit, versions
from dml_accel.report import results_markdown
from dml_accel.runfolder import RunFolder
from dml_accel.sources import Source


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
    """
    check_launch(config)
    label = cohort.label([spec.name for spec in cohort.parse(config.cohort)])
    speaks = launched_rank() == 0
    folder = RunFolder(config.output_dir, label) if speaks else None
    source = sources.read(config, quiet=not speaks)
    checked = check(config, source)
    display = Display(workload(config, source).total, quiet=not speaks)
    # From here on something is written, and processes wait for each other.
    with stopping_on_sigterm(), folder or contextlib.nullcontext(), contextlib.closing(display):
        processes = Processes(config)
        with processes.watching():
            results = run(config, checked, processes, folder, command, display)
            processes.close()
    return (folder.path, results) if folder and results else None


def run(
    config: Config,
    checked: Checked,
    processes: Processes,
    folder: RunFolder | None,
    command: str,
    display: Display,
    label: str = "",
    image_cost: float = 1.0,
) -> dict[str, Any] | None:
    """Train one cohort with processes that are already together.

    Args:
        config: the run.
        checked: what ``check`` returned for it.
        processes: those that share the work.
        folder: an entered run folder in the first process, None in the others.
        command: the command line, for the record.
        display: where progress is shown.
        label: what the display calls the run.
        image_cost: see ``workload``.

    Returns:
        The content of results.json in the first process.
    """
    forget_peak_memory(processes.device)
    path = Path(processes.text_of_first(str(folder.path.resolve()) if folder else ""))
    placement = Placement(config, processes, agreed_ranks(config, checked, processes, path))
    images = data.prepare(checked.source, config, placement.device)
    parameters = {name: parameter_count(module) for name, module in checked.modules.items()}
    mine = [spec for spec in checked.specs if spec.name in placement.mine]
    peers = [_peer(spec, checked.modules[spec.name], config, placement) for spec in mine]
    checked.modules.clear()
    windows = Windows(placement.names, len(images.train) // config.batch_size)
    if folder is None:
        last = _train(peers, images, config, placement)
    else:
        folder.write("config.json", _description(config, checked, placement, images, command))
        folder.status("running")
        work = workload(config, checked.source, image_cost)
        display.begin(label, work, config.epochs, config.batch_size)
        last = _train_and_record(peers, images, config, placement, folder, windows, display)
        display.end()
    error = _write_peers(path, peers, last, images, config, placement)
    # Also the wait for the files of all peers.
    unwritten = processes.largest(0 if error is None else 1 + processes.rank)
    memory = processes.largest(device_memory(placement.device))
    results = None
    if folder is not None:
        results = _results(checked, parameters, last, windows, config, placement, memory)
        folder.write("results.json", results)
        text = results_markdown(results, config.as_dict(), command)
        write_text(folder.path / "results.md", text)
    if unwritten:
        raise error or OSError(f"rank {unwritten - 1} could not write its peers below {path}")
    return results


def workload(config: Config, source: Source, image_cost: float = 1.0) -> Workload:
    """Return what a run costs, in forward passes of an image times ``image_cost``.

    Backward passes count twice. Where evaluations follow the clock, the last one alone is counted.
    """
    trained, held = data.check_sizes(source, config)
    steps = steps_to_take(config, trained)
    period = config.eval_interval.steps(trained // config.batch_size)
    evaluations = -(-steps // period) if period else 1
    evaluated = held + len(source.test)
    return Workload(steps, 3 * config.batch_size * image_cost, evaluations, evaluated * image_cost)


def _peer(spec: PeerSpec, module: nn.Module, config: Config, placement: Placement) -> Peer:
    net = placement.prepare(module)
    return Peer(spec, module, net, cohort.optimizer(module, config), placement.scaler())


def _train(
    peers: list[Peer], images: Data, config: Config, placement: Placement
) -> EvaluationRecord:
    """Train beside the process that writes, exchange for exchange; return the last evaluation."""
    for record in fit(peers, images, config, placement):
        last = record
    assert isinstance(last, EvaluationRecord), "fit ends with an evaluation"
    return last


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
) -> OSError | None:
    """Write the folders of the peers that this process leads; return what prevented it."""
    for peer in peers:
        if not placement.leads(peer.name):
            continue
        others = [name for name in placement.names if name != peer.name]
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
                taught_by=others if config.kl_weight > 0 else [],
            )
        except OSError as error:
            return error
    return None


def _description(
    config: Config, checked: Checked, placement: Placement, images: Data, command: str
) -> dict[str, Any]:
    return {
        "format": 1,
        "config": config.as_dict(),
        "peers": [{"name": spec.name, "arch": spec.arch} for spec in checked.specs],
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "classes": len(images.classes),
        "images": {"train": len(images.train), "test": len(images.test)},
        "versions": versions(),
        "command": command,
        "commit": commit(),
    }


def _train_and_record(
    peers: list[Peer],
    images: Data,
    config: Config,
    placement: Placement,
    folder: RunFolder,
    windows: Windows,
    display: Display,
) -> EvaluationRecord:
    folder.event("start", 0, 0)
    last = None
    for record in fit(peers, images, config, placement):
        if isinstance(record, EvaluationRecord):
            last = record
            folder.event("eval", record.step, record.epoch, test=record.test, val=record.val)
            display.evaluation(record)
            windows.restart_clock()
            continue
        window = windows.add(record)
        display.step(window)
        if window is not None:
            folder.event(
                "step",
                record.step,
                record.epoch,
                lr=record.lr,
                steps=window.steps,
                seconds=round(window.seconds, 6),
                peers=window.losses,
                **({"skipped": window.skipped} if window.skipped else {}),
            )
    assert last is not None, "fit ends with an evaluation"
    folder.event("end", last.step, last.epoch)
    return last


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
        "throughput": windows.throughput(config.batch_size),
        "peak_memory_bytes": memory,
        "versions": versions(),
        "sent_bytes_per_step": _sent(config, checked, placement),
    }
