"""What a run trains with: who trains what here, networks, images, teachers, and where it begins."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import is_compiled_module
from torch import nn

from dml_accel.core.config import Config
from dml_accel.data import batches as data
from dml_accel.data.batches import Data
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes, remedy_of_short_memory
from dml_accel.models import peer_folder as frozen
from dml_accel.models import spec as cohort
from dml_accel.models.build import parameter_count
from dml_accel.models.peer_folder import Frozen
from dml_accel.models.spec import Peer, PeerSpec
from dml_accel.mutual.step import one_at_a_time
from dml_accel.mutual.teaching import Teaching
from dml_accel.training.agenda import Start, steps_to_take
from dml_accel.training.keeping import load
from dml_accel.training.origin import Origin, with_starts
from dml_accel.training.resume import CHECKPOINTS
from dml_accel.training.setup import Checked, agreed_compilation, agreed_ranks, refuse_other_files


@dataclass(frozen=True)
class Prepared:
    """All that one process of a run needs to train.

    Attributes:
        config: the run.
        path: its folder.
        checked: its cohort and images, without the networks.
        placement: who trains what.
        images: on the device.
        teaching: who learns what from whom.
        teachers: networks that only teach.
        peers: those that learn here.
        compiled: names of all peers that are compiled, wherever they learn.
        parameters: how many each network learns.
        start: what the peers have behind them.
        goes_on: whether they come from a checkpoint.
    """

    config: Config
    path: Path
    checked: Checked
    placement: Placement
    images: Data
    teaching: Teaching
    teachers: list[Frozen]
    peers: list[Peer]
    compiled: list[str]
    parameters: dict[str, int]
    start: Start
    goes_on: bool

    @property
    def one_at_a_time(self) -> bool:
        """Whether one network's activations at a time are in memory."""
        return one_at_a_time(self.config, self.teaching)


def prepare(
    config: Config,
    checked: Checked,
    processes: Processes,
    path: Path,
    origin: Origin,
    compiles: bool | None = None,
) -> Prepared:
    """Place, compile and load what ``check`` has built; all processes do, together.

    Args:
        config: the run.
        checked: what ``check`` returned for it; its networks are taken out.
        processes: those that share the work.
        path: the run folder.
        origin: in every process, what the run goes on from.
        compiles: a decision for several runs (default: ``checking.agreed_compilation``'s).

    Raises:
        UsageError: see ``refuse_other_files``, ``with_starts``, ``agreed_ranks`` and ``load``.
        MemoryShortError: there was no memory for a tensor.
    """
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
    with remedy_of_short_memory(config, one_at_a_time(config, teaching)):
        names = origin.compiled(config, processes.world_size)
        if names is None:
            if compiles is None:
                steps = steps_to_take(config, len(images.train)) - start.step
                compiles = agreed_compilation(config, checked, placement, steps)
            names = checked.names if compiles else []
        peers = _peers(checked, config, placement, names)
    compiled = placement.named(peer.name for peer in peers if is_compiled_module(peer.net))
    load(origin, peers, processes)
    return Prepared(
        config,
        path,
        checked,
        placement,
        images,
        teaching,
        teachers,
        peers,
        compiled,
        parameters,
        start,
        origin.path is not None,
    )


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
