"""Before anything is trained: what can be refused is refused, and who trains what is agreed."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dml_accel.core.config import Config, UsageError
from dml_accel.core.tables import plan_text
from dml_accel.data import batches as data
from dml_accel.data.sources import Source
from dml_accel.distributed.allocation import everywhere
from dml_accel.distributed.batchnorm import check_spanning
from dml_accel.distributed.compile import seconds_saved
from dml_accel.distributed.costs import Cost, count, timed
from dml_accel.distributed.launch import launched_processes
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import Machine, both, choose, this_machine
from dml_accel.distributed.processes import Processes
from dml_accel.models import build as building
from dml_accel.models import peer_folder as frozen
from dml_accel.models import pretrained
from dml_accel.models import spec as cohort
from dml_accel.models.peer_folder import PeerFolder
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual import links
from dml_accel.mutual.links import Weights


@dataclass(frozen=True)
class Checked:
    """A cohort and images of which everything that can be refused has been.

    Attributes:
        specs: the peers, in the order of the command line.
        source: the images.
        modules: an untrained network for each peer; a run takes out what it needs and drops the
            rest.
        costs: of each peer, where there are several processes to share them.
        frozen: the folders of peers that only teach, by name.
        links: who learns from whom; None where all do from all alike.
        starts: trained weights that peers start from, by name, as they are recorded.
    """

    specs: list[PeerSpec]
    source: Source
    modules: dict[str, nn.Module]
    costs: dict[str, Cost]
    frozen: dict[str, PeerFolder]
    links: Weights | None
    starts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the peers that learn, in the order of the command line."""
        return [spec.name for spec in self.specs]

    @property
    def teachers(self) -> dict[str, Any]:
        """What the files that the configuration names hold: weights' sha256, links by name."""
        found = {
            name: {"arch": folder.arch, "sha256": folder.sha256}
            for name, folder in self.frozen.items()
        }
        return {"frozen": found, "links": self.links}


def check(config: Config, source: Source, begins: bool = True) -> Checked:
    """Build the networks; refuse a configuration that does not fit them or the images.

    Args:
        config: the run's.
        source: its images.
        begins: whether the networks are to hold the weights that they start from; a run that goes
            on from a checkpoint has no use for them, and they may be gone.

    Raises:
        UsageError: see the text.
    """
    data.check_sizes(source, config)
    specs = cohort.parse(config.cohort)
    known = frozen.read_all(config.frozen_peers, source.classes, config.image_size)
    weights = links.read(config.links, [spec.name for spec in specs], list(known))
    for folder in known.values():
        frozen.build(folder)
    starts = {
        spec.name: pretrained.read(spec.arch, spec.start)
        for spec in specs
        if begins and spec.start is not None
    }
    modules = {
        spec.name: building.build(spec, config, len(source.classes), starts.get(spec.name))
        for spec in specs
    }
    building.refuse_twins(modules)
    world_size, costs = launched_processes(), {}
    if world_size > 1:
        costs = {name: count(module, config.image_size) for name, module in modules.items()}
        ranks, _ = choose(costs, world_size, config, len(source.classes), this_machine())
        _check_batch_norm(config, modules, ranks)
    recorded = {name: start.record() for name, start in starts.items()}
    return Checked(specs, source, modules, costs, known, weights, recorded)


def refuse_other_files(checked: Checked, processes: Processes) -> None:
    """Refuse weights to start from, teachers or links that are not the first process's.

    Raises:
        UsageError: in all processes; a rank is named.
    """
    starts = {name: start.get("sha256") for name, start in checked.starts.items()}
    ours = json.dumps([starts, checked.teachers])
    differs = processes.text_of_first(ours) != ours
    rank = processes.largest(1 + processes.rank if differs else 0) - 1
    if rank >= 0:
        raise UsageError(
            f"rank {rank} reads other files than rank 0 behind pretrained=, --frozen-peers or "
            "--links; give all machines the same"
        )


def say_starts(checked: Checked) -> None:
    """Say which trained weights peers start from, a line each."""
    classes = len(checked.source.classes)
    for name, start in checked.starts.items():
        new = f"; its classifier, too: {classes} classes"
        if start["classes"] != classes:
            new = f"; its classifier is new: {classes} classes, and not {start['classes']}"
        print(f"{name} starts from {start['source']}{new}", file=sys.stderr, flush=True)


def _check_batch_norm(
    config: Config, modules: dict[str, nn.Module], ranks: dict[str, list[int]]
) -> None:
    for name, module in modules.items():
        if config.batch_norm == "group" and len(ranks[name]) > 1:
            check_spanning(module, name)


def agreed_ranks(
    config: Config, checked: Checked, processes: Processes, path: Path
) -> dict[str, list[int]]:
    """Return the first process's choice of who trains which peer.

    Raises:
        UsageError: a process does not see the run folder at ``path``, where it is to write.
    """
    if processes.world_size == 1:
        return everywhere(checked.modules, 1)
    blind = processes.largest(0 if (path / "run.lock").exists() else 1 + processes.rank) - 1
    if blind >= 0:
        if config.placement == "split":
            raise UsageError(
                f"rank {blind} does not see {path}, where --placement split lets it write its "
                "peers; name an --output-dir that all machines share, or --placement replicate"
            )
        if processes.rank == 0 and config.placement == "auto":
            print(f"placement: replicate, as rank {blind} does not see {path}", file=sys.stderr)
        config = dataclasses.replace(config, placement="replicate")
    text = ""
    if processes.rank == 0:
        costs = checked.costs
        if config.measure:
            costs = _with_times(costs, checked.specs, checked.modules, config, processes.device)
        classes = len(checked.source.classes)
        ranks, why = choose(costs, processes.world_size, config, classes, this_machine())
        print(f"placement: {why}", file=sys.stderr, flush=True)
        text = json.dumps(ranks)
    ranks = json.loads(processes.text_of_first(text))
    _check_batch_norm(config, checked.modules, ranks)
    return ranks


def agreed_compilation(config: Config, checked: Checked, placement: Placement, steps: int) -> bool:
    """Return whether to compile: as asked, or for ``auto`` as any process measures.

    Args:
        config: the run.
        checked: its networks.
        placement: who trains what.
        steps: optimizer steps to come, of this run or of several alike.
    """
    if config.compile != "auto":
        return config.compile == "on"
    return bool(placement.processes.largest(saved_here(config, checked, placement, steps) > 0))


def saved_here(config: Config, checked: Checked, placement: Placement, steps: int) -> float:
    """Return the seconds that compiling this process's peers saves; 0 for those of several.

    All processes measure at once, so that none waits for another that compiles.
    """
    if not placement.is_alone:
        return 0.0
    mine = [spec for spec in checked.specs if spec.name in placement.mine]
    accelerator = placement.processes.accelerator
    saved = seconds_saved(mine, checked.modules, config, steps, accelerator)
    placement.processes.release_networks()
    return saved


def _with_times(
    costs: dict[str, Cost],
    specs: list[PeerSpec],
    modules: dict[str, nn.Module],
    config: Config,
    device: torch.device,
) -> dict[str, Cost]:
    seconds = timed(specs, modules, config, device)
    return {name: dataclasses.replace(cost, seconds=seconds[name]) for name, cost in costs.items()}


def plan(config: Config, world_size: int, classes: int, machine: Machine) -> str:
    """Return tables of what both placements cost on ``world_size`` processes, without training.

    Args:
        config: cohort, batch, precision and exchange.
        world_size: processes.
        classes: of the images.
        machine: what is assumed of it.
    """
    specs = cohort.parse(config.cohort)
    modules = {spec.name: building.build(spec, config, classes) for spec in specs}
    costs = {name: count(module, config.image_size) for name, module in modules.items()}
    if config.measure:
        device = torch.device("cpu")
        if not config.cpu and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator() or device
        costs = _with_times(costs, specs, modules, config, device)
    _, why = choose(costs, world_size, config, classes, machine)
    return plan_text(
        both(costs, world_size, config, classes, machine), why, config, classes, machine
    )
