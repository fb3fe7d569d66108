"""Training and evaluation. The loop does not know the method: a step returns named parts.

Nothing here reads a number back from the device: records carry tensors, and whoever writes them
decides when to wait.

Shape letters: K peers, B rows of a batch, C classes.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dml_accel.cohort import Peer, learning_rate
from dml_accel.config import Config, Interval
from dml_accel.data import Data, ImageSet
from dml_accel.frozen import Frozen
from dml_accel.launching import Stop, StoppedError
from dml_accel.metrics import batch_sums, finish, no_sums
from dml_accel.placement import Placement
from dml_accel.schedules import PARTS, Step, train_step
from dml_accel.teaching import Teaching

_EVALUATION_ROWS = 256
_STEPS_BETWEEN_LOOKS = 10
# A cross-entropy that many times that of guessing means that a peer has diverged.
_BOUND = 100.0
_REMEDY = "a smaller --lr or --clip-norm 1 may help"


class DivergedError(RuntimeError):
    """A peer's loss stays not finite or out of all bounds; the text names the peer and the step."""


@dataclass(frozen=True)
class Start:
    """Where training begins: all that a run carries beside its peers.

    Attributes:
        step: optimizer steps taken before.
        lost: of each peer, how many steps in a row up to there were lost (0 where it is not named).
        kept: whether there is a checkpoint of that step where those of this run go.
    """

    step: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    kept: bool = False


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


def steps_to_take(config: Config, images: int) -> int:
    """Optimizer steps of a whole run over ``images`` training images."""
    steps = config.epochs * (images // config.batch_size)
    return min(steps, config.max_steps or steps)


def evaluation_follows(config: Config, images: int, step: int) -> bool:
    """Whether an evaluation comes after ``step`` optimizer steps, whatever the clock says."""
    last = step == steps_to_take(config, images)
    return step > 0 and (last or config.eval_interval.due(step, images // config.batch_size))


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
            accelerators, every ``_STEPS_BETWEEN_LOOKS`` steps); what one is asked, all do.
        teaching: who learns what from whom (default: all from all, as the configuration says).
        frozen: those that only teach.

    Raises:
        DivergedError: a peer lost ``--max-nonfinite`` steps in a row, or its predictions are not
            finite at the end.
        StoppedError: a stop was asked for; the checkpoint of the last step came before.
    """
    start, stop = start or Start(), stop or Stop()
    teaching = teaching or Teaching(config, [peer.name for peer in peers])
    peers, names = sorted(peers, key=lambda peer: peer.name), placement.names
    processes, classes = placement.processes, len(data.classes)
    first, on_cpu = processes.rank == 0, placement.device.type == "cpu"
    per_epoch = len(data.train) // config.batch_size
    steps = steps_to_take(config, len(data.train))
    evaluations, saves = _Clock(config.eval_interval), _Clock(config.save_interval)
    splits = [data.test, data.val] if data.val else [data.test]
    lost = torch.tensor([start.lost.get(name, 0) for name in names], device=placement.device)
    longest = lost
    step, kept = start.step, start.step if start.kept else None
    evaluate_now = evaluation_follows(config, len(data.train), step)
    # What goes on from elsewhere has a checkpoint of its own first; what begins has none.
    save_due = save_now = step > 0 and not start.kept
    stops = bool(processes.largest(stop.asked))

    def asks() -> list[bool]:
        return [stop.asked, first and evaluations.time_is_up, first and saves.time_is_up]

    while True:
        epoch = max(step - 1, 0) // per_epoch
        if (save_now or stops) and kept != step:
            yield CheckpointRecord(step, epoch, dict(zip(names, lost.tolist(), strict=True)))
            kept, save_due = step, False
            saves.restart()
            stops = bool(processes.largest(stop.asked))
        if evaluate_now and not stops:
            test, *val = [evaluate(peers, split, classes, placement, stop) for split in splits]
            if test is None or None in val:
                stops = True
                continue
            yield EvaluationRecord(step, epoch, test, val[0] if val else None)
            evaluations.restart()
        if stops:
            raise StoppedError(f"stopped by {stop.signal or 'a signal to another process'}")
        if step >= steps:
            break
        lr = learning_rate(config, step, per_epoch)
        losses, asked = train_step(
            Step(peers, frozen, data.train, step, lr, config, placement, teaching), asks
        )
        step += 1
        lost = torch.where(_is_sound(losses, classes), 0, lost + 1)
        longest = torch.maximum(longest, lost)
        evaluate_now = evaluation_follows(config, len(data.train), step)
        save_due |= step == steps or config.save_interval.due(step, per_epoch)
        # Looking makes an accelerator wait, so that it is looked at less often there.
        waits = on_cpu or evaluate_now or save_due or step % _STEPS_BETWEEN_LOOKS == 0
        if waits or processes.world_size == 1:
            stops, evaluation_is_up, save_is_up = (asked > 0).tolist()
            evaluate_now |= evaluation_is_up
            save_due |= save_is_up
        save_now = save_due and not lost.any()
        pauses = evaluate_now or save_now or stops
        yield StepRecord(step, (step - 1) // per_epoch, lr, pauses, losses)
        if waits:
            _refuse_diverged(longest.tolist(), names, step, config.max_nonfinite, classes)
    assert test is not None, "the last step is evaluated"
    for name, metrics in test["peers"].items():
        if metrics["nll"] is None:
            raise DivergedError(f"the predictions of {name} are not finite at the end; {_REMEDY}")


class _Clock:
    """When what is done every so many minutes is due again."""

    def __init__(self, interval: Interval) -> None:
        self._seconds = 60 * interval.count if interval.unit == "min" else math.inf
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() - self._since >= self._seconds


def _is_sound(losses_KP: Tensor, classes: int) -> Tensor:
    """Whether each peer's loss is finite and its cross-entropy within bounds, [K]."""
    within = losses_KP[:, PARTS.index("cross_entropy")] <= _BOUND * math.log(classes)
    return losses_KP[:, 0].isfinite() & within


def _refuse_diverged(lost: list[int], names: list[str], step: int, most: int, classes: int) -> None:
    for name, streak in zip(names, lost, strict=True):
        if streak >= most:
            raise DivergedError(
                f"the loss of {name} was not finite, or its cross-entropy above "
                f"{_BOUND * math.log(classes):.0f}, for {streak} steps in a row by step {step} "
                f"(--max-nonfinite {most}); {_REMEDY}"
            )


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
