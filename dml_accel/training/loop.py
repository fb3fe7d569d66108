"""Training and evaluation. The loop does not know the method: a step returns named parts.

Nothing here reads a number back from the device: records carry tensors, and whoever writes them
decides when to wait.

Shape letters: K peers, B rows of a batch, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import Config
from dml_accel.data.batches import Data, ImageSet
from dml_accel.distributed.launch import Stop, StoppedError
from dml_accel.distributed.placement import Placement
from dml_accel.models.peer_folder import Frozen
from dml_accel.models.spec import Peer, learning_rate
from dml_accel.mutual.metrics import batch_sums, finish, no_sums
from dml_accel.mutual.step import Step, train_step
from dml_accel.mutual.teaching import Teaching
from dml_accel.training.agenda import Agenda, Start, Streaks, refuse_lost

_EVALUATION_ROWS = 256


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step that was taken.

    Attributes:
        step: optimizer steps taken, this one included.
        epoch: the epoch it belongs to, from 0.
        lr: the learning rate it used.
        pauses: whether a checkpoint or an evaluation follows before the next step.
        losses_KP: mean over the batch of every peer's parts, in name order and ``PARTS`` order,
            on the device. A peer whose loss is not finite has skipped the step.
    """

    step: int
    epoch: int
    lr: float
    pauses: bool
    losses_KP: Tensor


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics after ``step`` optimizer steps, as ``metrics.finish`` returns them."""

    step: int
    epoch: int
    test: dict[str, Any]
    val: dict[str, Any] | None


@dataclass(frozen=True)
class CheckpointRecord:
    """What the run needs to go on from here is to be kept before ``fit`` is asked for more."""

    step: int
    epoch: int
    lost: dict[str, int]


Record = StepRecord | CheckpointRecord | EvaluationRecord


def fit(
    peers: Sequence[Peer],
    data: Data,
    config: Config,
    placement: Placement,
    start: Start | None = None,
    stop: Stop | None = None,
    teaching: Teaching | None = None,
    frozen: Sequence[Frozen] = (),
) -> Iterator[Record]:
    """Train the cohort: one record per step, checkpoint and evaluation; the last is an evaluation.

    A checkpoint comes before the evaluation of its step, so that an evaluation can be repeated. One
    that falls due while a peer loses steps waits until it has taken one.

    Args:
        peers: in the order of the command line; sums over peers run in name order.
        data: images on the placement's device.
        config: what to do.
        placement: where to do it.
        start: what the peers have behind them.
        stop: looked at after each step and while evaluating (where several processes have
            accelerators, every few steps); what one is asked, all do.
        teaching: who learns what from whom (default: all from all, as the configuration says).
        frozen: those that only teach.

    Raises:
        DivergedError: a peer lost ``--max-nonfinite`` steps in a row, or its predictions are not
            finite at the end.
        StoppedError: a stop was asked for; the checkpoint of the last step came before.
    """
    start, stop = start or Start(), stop or Stop()
    teaching = teaching or Teaching(config, [peer.name for peer in peers])
    peers = sorted(peers, key=lambda peer: peer.name)
    per_epoch = len(data.train) // config.batch_size
    agenda = Agenda(config, placement, len(data.train), start, stop)
    streaks = Streaks(placement, len(data.classes), start, config.max_nonfinite)
    step, found = start.step, None
    while True:
        epoch = max(step - 1, 0) // per_epoch
        if agenda.keeps(step):
            yield CheckpointRecord(step, epoch, streaks.by_name())
            agenda.has_kept(step)
        if agenda.evaluates and not agenda.stops:
            found = _evaluated(peers, data, placement, stop, step, epoch)
            if found is None:
                agenda.stops = True
                continue
            yield found
            agenda.has_evaluated()
        if agenda.stops:
            raise StoppedError(f"stopped by {stop.signal or 'a signal to another process'}")
        if agenda.is_done(step):
            break
        lr = learning_rate(config, step, per_epoch)
        losses, asked = train_step(
            Step(peers, frozen, data.train, step, lr, config, placement, teaching), agenda.asks
        )
        step += 1
        streaks.count(losses)
        looks = agenda.go_on(step, asked, streaks)
        yield StepRecord(step, (step - 1) // per_epoch, lr, agenda.pauses, losses)
        if looks:
            streaks.refuse_diverged(step)
    assert found is not None, "the last step is evaluated"
    refuse_lost(found.test["peers"])


def _evaluated(
    peers: Sequence[Peer], data: Data, placement: Placement, stop: Stop, step: int, epoch: int
) -> EvaluationRecord | None:
    """Evaluate on the test split, and on the validation split if there is one; None if stopped."""
    splits = [data.test, data.val] if data.val else [data.test]
    test, *val = [evaluate(peers, one, len(data.classes), placement, stop) for one in splits]
    if test is None or None in val:
        return None
    return EvaluationRecord(step, epoch, test, val[0] if val else None)


@torch.no_grad()
def evaluate(
    peers: Sequence[Peer],
    images: ImageSet,
    classes: int,
    placement: Placement,
    stop: Stop | None = None,
) -> dict[str, Any] | None:
    """Measure every peer and their ensemble on all of ``images``, each image counted once.

    The networks are in training mode again afterwards.

    Args:
        peers: those trained here.
        images: a split.
        classes: how many there are.
        placement: which rows are ours.
        stop: looked at after each chunk on a CPU, and where there is one process.

    Returns:
        See ``metrics.finish``; the same in all processes. None where one was asked to stop.
    """
    processes = placement.processes
    looks = stop and (processes.world_size == 1 or placement.device.type == "cpu")
    stops = False
    peers = sorted(peers, key=lambda peer: peer.name)
    modules = [peer.module.eval() for peer in peers]
    placement.share_buffers(modules)
    sums = no_sums(len(placement.names), placement.device)
    chunk = _EVALUATION_ROWS * placement.slices
    for start in range(0, len(images), chunk):
        stops = bool(looks and stop and processes.largest(stop.asked))
        if stops:
            break
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
    return None if stops else finish(placement.sum_over_rows(sums), placement.names, classes)
