"""Checkpoints of a run: written by all its processes together or by none, and loaded likewise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, UsageError
from dml_accel.core.versions import versions
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import Peer
from dml_accel.training import checkpoint
from dml_accel.training.loop import CheckpointRecord
from dml_accel.training.origin import Origin
from dml_accel.training.packing import CheckpointError
from dml_accel.training.resume import beside_the_config
from dml_accel.training.setup import Checked


class NotKeptError(RuntimeError):
    """A checkpoint could not be written; the text says why and what there is.

    Attributes:
        speaks: whether it is this process that could not.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def load(origin: Origin, peers: Sequence[Peer], processes: Processes) -> None:
    """Set this process's peers to the checkpoint, in all processes or in none.

    Raises:
        UsageError: a process cannot read it.
    """
    if origin.path is None:
        return
    problem = None
    try:
        checkpoint.load_peers(origin.path, peers)
    except CheckpointError as error:
        problem = error
    bad = processes.largest(0 if problem is None else 1 + processes.rank)
    if bad:
        raise UsageError(
            str(problem or f"rank {bad - 1} cannot read {origin.path}")
            + "; all machines must share the folder"
        ) from problem


def keep(
    root: Path,
    record: CheckpointRecord,
    peers: Sequence[Peer],
    state: dict[str, Any],
    config: Config,
    placement: Placement,
) -> None:
    """Write one checkpoint from all processes; the older ones stay until it is complete.

    Args:
        root: the folder of checkpoints.
        record: the step, and what else is carried.
        peers: those trained here; each is written by its leader.
        state: what ``description`` returned.
        config: the run's.
        placement: who leads which peer.

    Raises:
        NotKeptError: it could not be written, in all processes; the last one is as it was.
    """
    first = placement.processes.rank == 0
    folder, step = checkpoint.unnamed(root, record.step), record.step
    state = state | {"lost": record.lost}

    def begin() -> None:
        if first:
            checkpoint.begin(root, step)

    def write() -> None:
        for peer in peers:
            if placement.leads(peer.name):
                checkpoint.write_peer(folder, peer)

    def finish() -> None:
        if first:
            # Written while a peer loses steps, on request, it replaces no sound one.
            most = config.keep_checkpoints if not any(record.lost.values()) else None
            checkpoint.finish(folder, placement.names, step, state, most)

    for part in (begin, write, finish):
        problem = None
        try:
            part()
        except OSError as error:
            problem = error
        # Also the wait for all processes to have done their part.
        failed = placement.processes.largest(0 if problem is None else 1 + placement.processes.rank)
        if failed:
            if first:
                checkpoint.abandon(root)
            last = next((path.name for path in checkpoint.named(root)), None)
            raise NotKeptError(
                f"the checkpoint of step {step} could not be written"
                f"{f': {problem}' if problem else f' by rank {failed - 1}'}; "
                f"{f'{last} is as it was' if last else 'there is none before it'}",
                speaks=problem is not None,
            ) from problem


def description(
    config: Config, checked: Checked, placement: Placement, compiled: list[str]
) -> dict[str, Any]:
    """Return what a checkpoint says about its run; ``compiled`` names its compiled peers."""
    return {
        "config": config.as_dict(),
        "world_size": placement.processes.world_size,
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "versions": versions(),
        "compiled": compiled,
        "starts": checked.starts,
        **beside_the_config(config, checked),
    }
