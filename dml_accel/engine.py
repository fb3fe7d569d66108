"""Training and evaluation. The step returns named parts; the loop does not know the method.

Nothing here reads a number back from the device: records carry tensors, and whoever writes them
decides when to wait.

Shape letters: K peers, B rows of a batch, C classes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dml_accel.cohort import Peer, learning_rate
from dml_accel.config import Config
from dml_accel.data import Data, ImageSet
from dml_accel.keys import bounds, key
from dml_accel.losses import mutual_losses
from dml_accel.metrics import batch_sums, finish, no_sums
from dml_accel.placement import Placement

_EVALUATION_ROWS = 256


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step that was taken.

    Attributes:
        step: optimizer steps taken, this one included.
        epoch: the epoch it belongs to, from 0.
        lr: the learning rate it used.
        evaluates: whether an evaluation follows before the next step.
        losses_KP: mean over the batch of every peer's parts, in ``PARTS`` order, on the device.
    """

    step: int
    epoch: int
    lr: float
    evaluates: bool
    losses_KP: Tensor


PARTS = ("loss", "cross_entropy", "kl")


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics after ``step`` optimizer steps, as ``metrics.finish`` returns them."""

    step: int
    epoch: int
    test: dict[str, Any]
    val: dict[str, Any] | None


def steps_to_take(config: Config, images: int) -> int:
    """Optimizer steps of a whole run over ``images`` training images."""
    steps = config.epochs * (images // config.batch_size)
    return min(steps, config.max_steps or steps)


def fit(
    peers: Sequence[Peer], data: Data, config: Config, placement: Placement
) -> Iterator[StepRecord | EvaluationRecord]:
    """Train the cohort, one record per step and per evaluation; the last is an evaluation.

    Args:
        peers: in the order of the command line; sums over peers run in name order.
        data: images on the placement's device.
        config: what to do.
        placement: where to do it.
    """
    peers = sorted(peers, key=lambda peer: peer.name)
    per_epoch = len(data.train) // config.batch_size
    steps = steps_to_take(config, len(data.train))
    every, evaluated_at = config.eval_interval, time.monotonic()
    for step in range(steps):
        lr = learning_rate(config, step, per_epoch)
        losses = train_step(peers, data.train, step, lr, config, placement)
        minutes_up = every.unit == "min" and placement.processes.agreed(
            time.monotonic() - evaluated_at >= 60 * every.count
        )
        evaluates = step + 1 == steps or minutes_up or every.due(step + 1, per_epoch)
        yield StepRecord(step + 1, step // per_epoch, lr, evaluates, losses)
        if evaluates:
            yield EvaluationRecord(
                step + 1,
                step // per_epoch,
                evaluate(peers, data.test, len(data.classes), placement),
                evaluate(peers, data.val, len(data.classes), placement) if data.val else None,
            )
            evaluated_at = time.monotonic()


def train_step(
    peers: Sequence[Peer],
    images: ImageSet,
    step: int,
    lr: float,
    config: Config,
    placement: Placement,
) -> Tensor:
    """Take one optimizer step of the simultaneous schedule: forward all, backward all, step all.

    Args:
        peers: in name order.
        images: the training images.
        step: optimizer steps taken before.
        lr: learning rate of this step.
        config: the run's.
        placement: which rows are ours, and how gradients of several processes meet.

    Returns:
        The mean over the whole batch of loss, cross-entropy and KL, shape [K, 3], detached.
    """
    for peer in peers:
        peer.optimizer.zero_grad()
        for group in peer.optimizer.param_groups:
            group["lr"] = lr
    sums = []
    micro_batches = bounds(config.batch_size, config.grad_accum)
    for micro, (start, stop) in enumerate(micro_batches):
        lo, hi = placement.rows(stop - start)
        x, y = images.batch(step, config.batch_size, start + lo, start + hi)
        last = micro == len(micro_batches) - 1
        with placement.micro_batch([peer.net for peer in peers], last):
            logits = [_forward(peer, x, config.seed, step, micro, placement.rank) for peer in peers]
            losses = mutual_losses(
                torch.stack(logits),
                y,
                kl_weight=config.kl_weight,
                temperature=config.temperature,
                kl_reduction=config.kl_reduction,
            )
            # A sum over our rows divided by the whole batch, so that slices may be uneven.
            mean = losses.total.sum(1) * (placement.gradient_scale / config.batch_size)
            one = mean.new_ones(())
            mean.backward(torch.stack([peer.scaler.scale(one) for peer in peers]))
        sums.append(torch.stack([part.detach().sum(1) for part in losses], 1))
    for peer in peers:
        if config.clip_norm is not None:
            peer.scaler.unscale_(peer.optimizer)
            nn.utils.clip_grad_norm_(peer.module.parameters(), config.clip_norm)
        peer.scaler.step(peer.optimizer)
        peer.scaler.update()
    return placement.sum_over_rows(torch.stack(sums).sum(0)) / config.batch_size


def _forward(peer: Peer, x: Tensor, seed: int, step: int, micro: int, rank: int) -> Tensor:
    torch.manual_seed(key("dropout", seed, step, micro, peer.name, rank))
    return peer.net(x)


@torch.no_grad()
def evaluate(
    peers: Sequence[Peer], images: ImageSet, classes: int, placement: Placement
) -> dict[str, Any]:
    """Measure every peer and their ensemble on all of ``images``, each image counted once.

    The networks are in training mode again afterwards.

    Returns:
        See ``metrics.finish``.
    """
    peers = sorted(peers, key=lambda peer: peer.name)
    modules = [peer.module.eval() for peer in peers]
    placement.share_buffers(modules)
    lo, hi = placement.rows(len(images))
    sums = [no_sums(len(peers), placement.device)]  # ours may be no rows at all
    for start in range(lo, hi, _EVALUATION_ROWS):
        x, y = images.rows(start, min(start + _EVALUATION_ROWS, hi))
        sums.append(batch_sums(torch.stack([module(x) for module in modules]), y))
    for module in modules:
        module.train()
    total = placement.sum_over_rows(torch.stack(sums).sum(0))
    return finish(total, [peer.name for peer in peers], classes)
