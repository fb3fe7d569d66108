"""Logits of peers that are in different processes, for a training loop of one's own.

Shape letters: K peers in all processes, k of them in this one, B rows of the batch, C classes.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from dml_accel.core.errors import UsageError

# What was compared between the processes already: once for each shape, because it waits for all.
_compared: set[tuple[object, ...]] = set()


def gather_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits of the peers of all processes, [K, B, C], in the order of the ranks.

    Every process holds as many peers, and all of them see the same batch::

        logits = gather_logits(net(images), labels)
        accelerator.backward(mutual_loss(logits, labels).loss)

    Without other processes these are the logits themselves. A network that is in one process only
    is not to be wrapped in DDP, which would average the gradients of different peers.

    Args:
        logits: of this process's peer, [B, C], or of its peers, [k, B, C].
        labels: classes of the batch, [B]. The first time for each shape they are compared between
            the processes.

    Returns:
        The rows of this process's peers carry their gradients; all others are constants.

    Raises:
        UsageError: in all processes: they have different shapes, or different batches; or several
            were launched that do not know of each other.
    """
    if logits.dim() not in (2, 3):
        raise UsageError(
            f"gather_logits: logits are {list(logits.shape)}; they must be [B, C] of one peer, or "
            "[k, B, C]"
        )
    ours = logits[None] if logits.dim() == 2 else logits
    _require_group()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ours
    _compare(ours, labels)
    sent = ours.detach().contiguous()
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(received, sent)
    received[dist.get_rank()] = ours  # with its graph
    return torch.cat(received)


def _require_group() -> None:
    """Refuse processes that were launched together, and would each learn alone."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1" and not dist.is_initialized():
        raise UsageError(
            f"gather_logits: WORLD_SIZE is {launched}, but there is no process group: create the "
            "Accelerator before, on a machine without a GPU as Accelerator(cpu=True)"
        )


def _compare(ours: Tensor, labels: Tensor) -> None:
    """Refuse logits of different shapes or types, and labels of different batches."""
    key = (dist.group.WORLD, ours.shape, ours.dtype, labels.shape)
    if key in _compared:
        return
    facts = [*ours.shape, ours.dtype.itemsize, len(labels)]
    everyone = _gathered(torch.tensor(facts, device=ours.device))
    if any(found != facts for found in everyone):
        shown = ", ".join(str(found[:3]) for found in everyone)
        raise UsageError(
            f"gather_logits: the processes have logits of {shown}, by rank; all must have as many "
            "peers, images and classes, of one dtype"
        )
    everyone = _gathered(labels.to(ours.device, torch.int64).contiguous())
    differing = next((rank for rank, found in enumerate(everyone) if found != everyone[0]), None)
    if differing is not None:
        raise UsageError(
            f"gather_logits: rank {differing} has another batch than rank 0, but peers learn from "
            "each other's predictions for the same images: do not let Accelerate shard the loader "
            "(leave it out of accelerator.prepare), and seed its order alike in all processes"
        )
    _compared.add(key)


def _gathered(ours: Tensor) -> list[list[int]]:
    received = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(received, ours)
    return [one.tolist() for one in received]
