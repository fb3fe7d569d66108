"""Training and evaluation. The step returns named parts; the loop does not know the method.

Nothing here reads a number back from the device: records carry tensors, and whoever writes them
decides when to wait.

Shape letters: K peers, B rows of a batch, C classes.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml_accel.cohort import Peer, learning_rate
from dml_accel.config import Config
from dml_accel.data import Data, ImageSet
from dml_accel.keys import bounds, key
from dml_accel.losses import mutual_losses
from dml_accel.metrics import batch_sums, finish, no_sums
from dml_accel.placement import Placement

_EVALUATION_ROWS = 256


class NotFiniteError(RuntimeError):
    """A peer's loss stays not finite; the text names the peer and the step."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step that was taken.

    Attributes:
        step: optimizer steps taken, this one included.
        epoch: the epoch it belongs to, from 0.
        lr: the learning rate it used.
        evaluates: whether an evaluation follows before the next step.
        losses_KP: mean over the batch of every peer's parts, in name order and ``PARTS`` order,
            on the device. A peer whose loss is not finite has skipped the step.
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
    streaks = torch.zeros(len(placement.names), dtype=torch.int64, device=placement.device)
    longest = streaks
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
        streaks = torch.where(losses[:, 0].isfinite(), 0, streaks + 1)
        longest = torch.maximum(longest, streaks)
        # Looking makes an accelerator wait, so that it is looked at less often there.
        often = placement.device.type == "cpu" or (step + 1) % config.max_nonfinite == 0
        if often or evaluates:
            _stop_if_lost(longest.tolist(), placement.names, step + 1, config.max_nonfinite)
        if evaluates:
            test = evaluate(peers, data.test, len(data.classes), placement)
            val = evaluate(peers, data.val, len(data.classes), placement) if data.val else None
            yield EvaluationRecord(step + 1, step // per_epoch, test, val)
            evaluated_at = time.monotonic()
    for name, metrics in test["peers"].items():
        if metrics["nll"] is None:
            raise NotFiniteError(
                f"the predictions of {name} are not finite after the last step; a smaller --lr or "
                "--clip-norm 1 may help"
            )


def _stop_if_lost(streaks: list[int], names: list[str], step: int, most: int) -> None:
    for name, streak in zip(names, streaks, strict=True):
        if streak >= most:
            raise NotFiniteError(
                f"the loss of {name} was not finite for {streak} steps in a row by step "
                f"{step} (--max-nonfinite {most}); a smaller --lr or --clip-norm 1 may help"
            )


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
        peers: those trained here, in name order.
        images: the training images.
        step: optimizer steps taken before.
        lr: learning rate of this step.
        config: the run's.
        placement: which rows are ours, and how gradients of several processes meet.

    Returns:
        The mean over the whole batch of loss, cross-entropy and KL of all peers, shape [K, 3],
        detached. A peer whose loss is not finite stays as it is.
    """
    for peer in peers:
        peer.begin(lr)
    mutual = config.kl_weight > 0 and len(placement.names) > 1
    sums = []
    micro_batches = bounds(config.batch_size, config.grad_accum)
    for micro, (start, stop) in enumerate(micro_batches):
        lo, hi = placement.rows(stop - start)
        x, y = images.batch(step, config.batch_size, start + lo, start + hi)
        last = micro == len(micro_batches) - 1
        with placement.micro_batch([peer.net for peer in peers], last):
            logits = torch.stack(
                [_forward(peer, x, config.seed, step, micro, placement.index) for peer in peers]
            )
            losses = mutual_losses(
                logits,
                y,
                placement.targets(logits, stop - start) if mutual else None,
                kl_weight=config.kl_weight,
                temperature=config.temperature,
                kl_reduction=config.kl_reduction,
            )
            # A sum over our rows divided by the whole batch, so that slices may be uneven.
            mean = losses.total.sum(1) * (placement.gradient_scale / config.batch_size)
            # The scaler of half precision, too, must find nothing finite in what is skipped.
            ones = torch.where(mean.detach().isfinite(), 1.0, math.nan)
            scaled = [peer.scaler.scale(one) for peer, one in zip(peers, ones, strict=True)]
            mean.backward(torch.stack(scaled))
        sums.append(torch.stack([part.detach().sum(1) for part in losses], 1))
    means = placement.of_all_peers(torch.stack(sums).sum(0)) / config.batch_size
    finite = means[:, 0].isfinite()
    for peer in peers:
        peer.update(finite[placement.names.index(peer.name)], config.clip_norm)
    return means


def _forward(peer: Peer, x: Tensor, seed: int, step: int, micro: int, index: int) -> Tensor:
    torch.manual_seed(key("dropout", seed, step, micro, peer.name, index))
    return peer.net(x)


@torch.no_grad()
def evaluate(
    peers: Sequence[Peer], images: ImageSet, classes: int, placement: Placement
) -> dict[str, Any]:
    """Measure every peer and their ensemble on all of ``images``, each image counted once.

    The networks are in training mode again afterwards.

    Args:
        peers: those trained here.
        images: a split.
        classes: how many there are.
        placement: which rows are ours.

    Returns:
        See ``metrics.finish``; the same in all processes.
    """
    peers = sorted(peers, key=lambda peer: peer.name)
    modules = [peer.module.eval() for peer in peers]
    placement.share_buffers(modules)
    sums = no_sums(len(placement.names), placement.device)
    chunk = _EVALUATION_ROWS * placement.slices
    for start in range(0, len(images), chunk):
        count = min(chunk, len(images) - start)
        lo, hi = placement.rows(count)
        x, y = images.rows(start + lo, start + hi)
        # Ours may be no rows at all, which not every network takes.
        ours = [module(x) if hi > lo else x.new_zeros(0, classes) for module in modules]
        everyone = placement.gather(torch.stack(ours), count)
        if placement.counts_rows and hi > lo:
            sums += batch_sums(everyone, y)
    for module in modules:
        module.train()
    return finish(placement.sum_over_rows(sums), placement.names, classes)
