"""One run from its configuration to its folder: everything is checked, then trained, then kept."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dml_accel import cohort, data, sources
from dml_accel.cohort import Peer, PeerSpec
from dml_accel.config import Config
from dml_accel.data import Data
from dml_accel.engine import EvaluationRecord, StepRecord, fit, steps_to_take
from dml_accel.export import write_peer
from dml_accel.placement import Placement
from dml_accel.progress import Display, Windows, device_memory
from dml_accel.report import results_markdown
from dml_accel.runfolder import RunFolder, default_path

_PACKAGES = ("dml-accel", "torch", "torchvision", "accelerate", "datasets", "timm", "safetensors")


def train(config: Config, command: str) -> tuple[Path, dict[str, Any]]:
    """Train a cohort as ``config`` says.

    Args:
        config: the run.
        command: the command line that asked for it, for the record.

    Returns:
        The run folder, and the content of its results.json.

    Raises:
        UsageError: the input does not allow the run; nothing has been written then.
    """
    specs = cohort.parse(config.cohort)
    names = [spec.name for spec in specs]
    folder = RunFolder(Path(config.output_dir) if config.output_dir else default_path(names))
    source = sources.read(config)
    data.held_out(source, config)
    placement = Placement(config)
    images = data.prepare(source, config, placement.device)
    peers = [_peer(spec, config, len(images.classes), placement) for spec in specs]
    with folder:
        folder.write(
            "config.json",
            {
                "format": 1,
                "config": config.as_dict(),
                "peers": [{"name": spec.name, "arch": spec.arch} for spec in specs],
                "classes": len(images.classes),
                "images": {"train": len(images.train), "test": len(images.test)},
                "versions": versions(),
                "command": command,
                "commit": _commit(),
            },
        )
        folder.status("running")
        last, windows = _train_and_record(peers, images, config, placement, folder)
        results = _results(peers, last, windows, config, placement)
        for peer in peers:
            write_peer(
                folder.path / "peers" / peer.name,
                peer,
                last.test["peers"][peer.name],
                classes=images.classes,
                normalisation=images.normalisation,
                image_size=config.image_size,
                dataset=config.dataset,
                cohort=names,
            )
        folder.write("results.json", results)
        markdown = results_markdown(results, config.as_dict(), command)
        (folder.path / "results.md").write_text(markdown)
    return folder.path, results


def _peer(spec: PeerSpec, config: Config, classes: int, placement: Placement) -> Peer:
    module = cohort.build(spec, config, classes)
    net = placement.prepare(module)
    return Peer(spec, module, net, cohort.optimizer(module, config))


def _train_and_record(
    peers: list[Peer], images: Data, config: Config, placement: Placement, folder: RunFolder
) -> tuple[EvaluationRecord, Windows]:
    per_epoch = len(images.train) // config.batch_size
    windows = Windows(sorted(peer.name for peer in peers), per_epoch)
    display = Display(steps_to_take(config, len(images.train)), config.epochs, config.batch_size)
    folder.event("start", 0, 0)
    last = None
    try:
        for record in fit(peers, images, config, placement):
            if isinstance(record, StepRecord):
                window = windows.add(record)
                display.step(window)
            else:
                window, last = windows.close(), record
            if window is not None:
                folder.event(
                    "step",
                    window.last.step,
                    window.last.epoch,
                    lr=window.last.lr,
                    steps=window.steps,
                    seconds=round(window.seconds, 6),
                    peers=window.losses,
                )
            if isinstance(record, EvaluationRecord):
                folder.event("eval", record.step, record.epoch, test=record.test, val=record.val)
                display.evaluation(record)
                windows.restart_clock()
    finally:
        display.close()
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
        "mixed_precision": placement.mixed_precision,
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
        "peak_memory_bytes": device_memory(placement.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def _commit() -> str | None:
    """Return the commit of this source tree, None where it is not a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def command_line() -> str:
    """Return the command that started this process, quoted for a shell."""
    import shlex

    return shlex.join([Path(sys.executable).name, *sys.argv])
