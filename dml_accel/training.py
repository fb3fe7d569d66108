"""One run from its configuration to its folder: everything is checked, then trained, then kept."""

import contextlib
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from dml_accel import cohort, data, sources
from dml_accel.cohort import Peer, PeerSpec
from dml_accel.config import Config
from dml_accel.data import Data
from dml_accel.engine import EvaluationRecord, fit, steps_to_take
from dml_accel.export import write_peer
from dml_accel.placement import Placement
from dml_accel.processes import (
    Processes,
    check_launch,
    check_networks,
    launched_rank,
    stopping_on_sigterm,
)
from dml_accel.progress import Display, Windows, Workload, device_memory
from dml_accel.report import results_markdown
from dml_accel.runfolder import RunFolder
from dml_accel.sources import Source

_PACKAGES = ("dml-accel", "torch", "torchvision", "accelerate", "datasets", "timm", "safetensors")


@dataclass(frozen=True)
class Checked:
    """A cohort and images of which everything that can be refused has been.

    Attributes:
        specs: the peers, in the order of the command line.
        source: the images.
        modules: an untrained network for each peer.
    """

    specs: list[PeerSpec]
    source: Source
    modules: dict[str, nn.Module]


def check(config: Config, source: Source) -> Checked:
    """Build the networks; refuse a configuration that does not fit them or the images.

    Raises:
        UsageError: see the text.
    """
    data.check_sizes(source, config)
    specs = cohort.parse(config.cohort)
    modules = {spec.name: cohort.build(spec, config, len(source.classes)) for spec in specs}
    check_networks(config, modules)
    return Checked(specs, source, modules)


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
    placement = Placement(config, processes)
    images = data.prepare(checked.source, config, placement.device)
    peers = [_peer(spec, checked.modules[spec.name], config, placement) for spec in checked.specs]
    results = None
    if folder is None:
        _follow(peers, images, config, placement)
    else:
        work = workload(config, checked.source, image_cost)
        display.begin(label, work, config.epochs, config.batch_size)
        results = _write(peers, images, config, placement, folder, command, display)
        display.end()
    processes.release_networks()
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


def _follow(peers: list[Peer], images: Data, config: Config, placement: Placement) -> None:
    """Train beside the process that writes, exchange for exchange."""
    for _ in fit(peers, images, config, placement):
        pass
    placement.processes.largest(device_memory(placement.device))


def _write(
    peers: list[Peer],
    images: Data,
    config: Config,
    placement: Placement,
    folder: RunFolder,
    command: str,
    display: Display,
) -> dict[str, Any]:
    """Train, and write all that a run leaves; return the content of results.json."""
    folder.write("config.json", _description(config, peers, images, command))
    folder.status("running")
    last, windows = _train_and_record(peers, images, config, placement, folder, display)
    results = _results(peers, last, windows, config, placement)
    folder.write("results.json", results)
    names = [peer.name for peer in peers]
    for peer in peers:
        write_peer(
            folder.path / "peers" / peer.name,
            peer,
            last.test["peers"][peer.name],
            classes=images.classes,
            normalisation=images.normalisation,
            image_size=config.image_size,
            dataset=config.dataset,
            steps=last.step,
            taught_by=[name for name in names if name != peer.name and config.kl_weight > 0],
        )
    markdown = results_markdown(results, config.as_dict(), command)
    (folder.path / "results.md").write_text(markdown)
    return results


def _description(config: Config, peers: list[Peer], images: Data, command: str) -> dict[str, Any]:
    return {
        "format": 1,
        "config": config.as_dict(),
        "peers": [{"name": peer.name, "arch": peer.spec.arch} for peer in peers],
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
    display: Display,
) -> tuple[EvaluationRecord, Windows]:
    per_epoch = len(images.train) // config.batch_size
    windows = Windows(sorted(peer.name for peer in peers), per_epoch)
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
            )
    assert last is not None, "fit ends with an evaluation"
    folder.event("end", last.step, last.epoch)
    return last, windows


def _results(
    peers: list[Peer],
    last: EvaluationRecord,
    windows: Windows,
    config: Config,
    placement: Placement,
) -> dict[str, Any]:
    names = [peer.name for peer in peers]
    return {
        "format": 1,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": last.step,
        "device": str(placement.device),
        "mixed_precision": placement.processes.mixed_precision,
        "world_size": placement.world_size,
        "placement": {"kind": placement.kind, "ranks": placement.ranks(names)},
        "peers": [
            {
                "name": peer.name,
                "arch": peer.spec.arch,
                "params": peer.parameters,
                "test": last.test["peers"][peer.name],
                "val": last.val["peers"][peer.name] if last.val else None,
            }
            for peer in peers
        ],
        "ensemble": last.test["ensemble"],
        "agreement": last.test["agreement"],
        "throughput": windows.throughput(config.batch_size),
        "peak_memory_bytes": placement.processes.largest(device_memory(placement.device)),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Return the commit of this source tree, ``-dirty`` behind it where files differ from it.

    None where the package is not part of a checkout of its own.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """Return the command that started this process, quoted for a shell."""
    import shlex

    script = Path(sys.argv[0]).name
    names = {"__main__.py": ["python", "-m", "dml_accel"], "dml-accel": ["dml-accel"]}
    return shlex.join([*names.get(script, ["python", script]), *sys.argv[1:]])
