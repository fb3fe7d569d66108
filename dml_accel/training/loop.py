"""The training loop, and evaluation. The loop does not know the method: a step returns named parts.

Nothing here reads a value back from the device in every step: records carry tensors, and whoever
writes them decides when to wait for the device.

Shape letters: K peers, B rows of a batch, C classes, P parts of a loss.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import OptimConfig, RunConfig
from dml_accel.core.errors import DivergedError, StoppedError
from dml_accel.core.flags import Interval
from dml_accel.data.batches import ImageSet
from dml_accel.data.decode import DamagedImagesError
from dml_accel.data.images import Data
from dml_accel.distributed.launch import Stop
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.metrics import batch_sums, finish, no_sums
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.step import PARTS, Cohort, reads, train_step
from dml_accel.training.choosing import Choosing, is_over
from dml_accel.training.rates import Rates, Schedule

_EVALUATION_ROWS = 256
STEPS_BETWEEN_LOOKS = 10
# A cross-entropy this many times that of guessing means that a peer has diverged.
_DIVERGED = 100.0
_REMEDY = "a smaller --lr or --clip-norm 1 may help"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step that was taken.

    Attributes:
        step: optimizer steps taken, this one included.
        epoch: the epoch of the step, from 0.
        lr: the learning rate of the step, of peers without one of their own.
        pauses: whether a checkpoint or an evaluation follows before the next step.
        losses_KP: mean over the batch of the ``PARTS`` of every peer's loss, in name order, on the
            device. A peer whose loss is not finite has skipped the step.
        lrs: the learning rate of every peer, in name order.
        waited: seconds for which the step has waited for images; None if they are in memory.
    """

    step: int
    epoch: int
    lr: float
    pauses: bool
    losses_KP: Tensor
    lrs: Mapping[str, float] = field(default_factory=dict)
    waited: float | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics after ``step`` optimizer steps, as ``metrics.finish`` returns them.

    Attributes:
        step: optimizer steps taken.
        epoch: the epoch of the last step, from 0.
        test: on the test split.
        val: on the validation split, if there is one.
        ema: with ``--ema``, ``test`` and ``val`` of the averages of the weights.
        best: with ``--keep best``, the best evaluation of each peer up to now, this one included;
            see ``Choosing``.
    """

    step: int
    epoch: int
    test: dict[str, Any]
    val: dict[str, Any] | None
    ema: dict[str, Any] | None = None
    best: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint is due: whoever iterates over ``fit`` writes it before asking for more.

    Attributes:
        step: optimizer steps taken.
        epoch: the epoch of the last step, from 0.
        lost: how many steps in a row each peer has lost up to now.
        chosen: what ``Choosing`` remembers, as JSON.
    """

    step: int
    epoch: int
    lost: dict[str, int]
    chosen: dict[str, Any] = field(default_factory=dict)


Record = StepRecord | CheckpointRecord | EvaluationRecord


@dataclass(frozen=True)
class Start:
    """Where training starts: all that a run carries besides its peers.

    Attributes:
        step: optimizer steps taken before.
        lost: how many steps in a row each peer has lost up to there; 0 if it is not named.
        saved: whether this run's folder has a checkpoint of that step.
        chosen: what ``Choosing`` remembers up to there.
    """

    step: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    saved: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)


def steps_to_take(optim: OptimConfig, images: int) -> int:
    """Return the optimizer steps of a whole run over ``images`` training images."""
    steps = optim.epochs * (images // optim.batch_size)
    return min(steps, optim.max_steps or steps)


def evaluation_follows(optim: OptimConfig, run: RunConfig, images: int, step: int) -> bool:
    """Whether an evaluation follows ``step`` optimizer steps, apart from intervals in minutes."""
    last = step == steps_to_take(optim, images)
    return step > 0 and (last or run.eval_interval.due(step, images // optim.batch_size))


def begins_with_evaluation(optim: OptimConfig, run: RunConfig, images: int, start: Start) -> bool:
    """Whether an evaluation comes before the first step; in a run that resumes it is repeated."""
    # One that is over was interrupted before it could say so.
    over = is_over(optim.early_stop, start.chosen)
    return over or evaluation_follows(optim, run, images, start.step)


# ---------------------------------------------------------------- training


def fit(
    cohort: Cohort,
    data: Data,
    run: RunConfig,
    start: Start | None = None,
    stop: Stop | None = None,
    schedule: Schedule | None = None,
) -> Iterator[Record]:
    """Train the cohort: a record per step, checkpoint and evaluation; the last step is evaluated.

    A checkpoint comes before the evaluation of the same step, so that a failure in it costs no
    steps. With ``--keep best`` or ``--early-stop`` it comes after it and holds what was chosen,
    except where a stop is asked for meanwhile; when training goes on, the evaluation is repeated,
    and the last checkpoint, if it lacks it, is written again. One that is due while a peer loses
    steps waits until all peers have taken a step. With ``--early-stop``, training may end before
    its last step.

    Args:
        cohort: the peers of this process, and what they are trained with.
        data: images on the device of the placement.
        run: intervals, and when a peer counts as diverged.
        start: what the peers have behind them.
        stop: checked after each step and during evaluation; with several accelerators every few
            steps. A stop that one process is asked for is obeyed by all.
        schedule: of the learning rates; None: by the flags.

    Raises:
        DivergedError: a peer lost ``--max-nonfinite`` steps in a row, or its predictions are not
            finite at the end.
        StoppedError: the run was stopped; a checkpoint of the last step was due before.
        DamagedImagesError: images cannot be read, in this process or in another; raised in all of
            them, and a checkpoint of the last step was due before.
    """
    start, images = start or Start(), cohort.images
    try:
        steps = range(start.step, steps_to_take(cohort.optim, len(data.train)))
        per_step = sum(1 for _ in reads(cohort, range(1)))
        images.begin(cohort.optim.batch_size, reads(cohort, steps), per_step)
        rates = Rates.of(
            cohort.optim, cohort.placement.names, cohort.peers, cohort.steps_per_epoch, schedule
        )
        yield from _fit(cohort, data, run, start, stop or Stop(), rates)
    finally:
        images.close()


def _fit(
    cohort: Cohort, data: Data, run: RunConfig, start: Start, stop: Stop, rates: Rates
) -> Iterator[Record]:
    placement, optim, per_epoch = cohort.placement, cohort.optim, cohort.steps_per_epoch
    agenda = Agenda(optim, run, placement, data.train, start, stop)
    bound = _DIVERGED * math.log(len(data.classes)) * cohort.largest_weight
    streaks = Streaks(placement, bound, start, run.max_nonfinite)
    choosing = Choosing(cohort.peers, run.keep == "best", optim.early_stop, start.chosen)
    step, evaluation = start.step, None
    while True:
        epoch = max(step - 1, 0) // per_epoch
        comes_first = choosing.is_on and agenda.evaluates and not agenda.stops  # the evaluation
        if agenda.saves(step) and not comes_first:
            yield CheckpointRecord(step, epoch, streaks.by_name(), choosing.state())
            agenda.has_saved(step)
        if agenda.evaluates and not agenda.stops:
            evaluation = _evaluate_splits(cohort.peers, data, placement, stop, step, epoch)
            if evaluation is None:  # stopped meanwhile: the checkpoint comes first
                agenda.stops = True
                agenda.meets_damage = any(one.meets_damage for one in data.evaluated)
                continue
            has_news = choosing.take(step, evaluation.test, evaluation.val)
            evaluation = replace(evaluation, best=choosing.best and dict(choosing.best))
            yield evaluation
            agenda.has_evaluated()
            if choosing.is_over:
                agenda.end()
            if has_news and agenda.is_done(step):
                agenda.save_again(streaks)
            if choosing.is_on:
                continue  # with the checkpoint that waits for it
        if agenda.meets_damage:
            raise DamagedImagesError(data.damage)
        if agenda.stops:
            raise StoppedError(f"stopped by {stop.signal or 'a signal to another process'}")
        if agenda.is_done(step):
            break
        of_step = rates(step)
        before = data.train.waited
        losses, requested = train_step(cohort, step, of_step.set, agenda.requests)
        step += 1
        streaks.count(losses)
        looks = agenda.advance(step, requested, streaks)
        waited = None if before is None else (data.train.waited or 0.0) - before
        epoch, lr = (step - 1) // per_epoch, of_step.lr
        yield StepRecord(step, epoch, lr, agenda.pauses, losses, of_step.lrs, waited)
        if looks:
            streaks.refuse_diverged(step)
    assert evaluation is not None, "the last step is evaluated"
    _refuse_lost(evaluation.test["peers"])


class Agenda:
    """What comes before the next step: a checkpoint, an evaluation, or the end.

    Attributes:
        evaluates: whether an evaluation is due.
        stops: whether any process was asked to stop.
        meets_damage: whether it stops because a process cannot read images.
    """

    def __init__(
        self,
        optim: OptimConfig,
        run: RunConfig,
        placement: Placement,
        images: ImageSet,
        start: Start,
        stop: Stop,
    ) -> None:
        self._optim, self._run, self._stop = optim, run, stop
        self._set, self._images = images, len(images)
        self._processes = placement.processes
        self._on_cpu = placement.device.type == "cpu"
        self._evaluation_timer = _Timer(run.eval_interval)
        self._save_timer = _Timer(run.save_interval)
        self._saved_step = start.step if start.saved else None
        self._ends = False
        self.evaluates = begins_with_evaluation(optim, run, self._images, start)
        # A run that continues another one's checkpoint first writes its own.
        self._save_due = self._saves_now = start.step > 0 and not start.saved
        self.meets_damage = bool(self._processes.all_reduce_max(images.meets_damage))
        self.stops = self._hears_of_a_stop()

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due now."""
        return (self._saves_now or self.stops) and self._saved_step != step

    def has_saved(self, step: int) -> None:
        """Record that the checkpoint was saved, and check again for requests to stop."""
        self._saved_step, self._save_due = step, False
        self._save_timer.restart()
        self.stops = self._hears_of_a_stop()

    def _hears_of_a_stop(self) -> bool:
        return self.meets_damage or bool(self._processes.all_reduce_max(self._stop.requested))

    def has_evaluated(self) -> None:
        """Record that the evaluation was made."""
        self.evaluates = False
        self._evaluation_timer.restart()

    def end(self) -> None:
        """Take no more steps."""
        self._ends = True

    def save_again(self, streaks: "Streaks") -> None:
        """Make the last checkpoint due, even if this step has one."""
        self._saved_step, self._saves_now = None, not streaks.any()

    def is_done(self, step: int) -> bool:
        """Whether all steps are taken, or no more are wanted."""
        return self._ends or step >= steps_to_take(self._optim, self._images)

    def requests(self) -> list[bool]:
        """Return what this process requests: stop, evaluate, save. Rank 0's clock decides.

        Last, whether it cannot read images of a step to come.
        """
        timers = (self._evaluation_timer, self._save_timer)
        decides = self._processes.rank == 0
        clock = [decides and timer.is_up for timer in timers]
        return [self._stop.requested, *clock, self._set.meets_damage]

    def advance(self, step: int, requested: Tensor, streaks: "Streaks") -> bool:
        """Decide what is due after a step; return whether the device may be waited for now.

        Args:
            step: optimizer steps taken.
            requested: how many processes have each of the ``requests``, [4] on the device.
            streaks: of steps that peers have lost.
        """
        per_epoch = self._images // self._optim.batch_size
        self.evaluates = evaluation_follows(self._optim, self._run, self._images, step)
        self._save_due |= self.is_done(step) or self._run.save_interval.due(step, per_epoch)
        # Looking at the requests waits for an accelerator, so it happens less often there.
        due = self.evaluates or self._save_due or step % STEPS_BETWEEN_LOOKS == 0
        looks = self._on_cpu or due
        if looks or self._processes.world_size == 1:
            stops, evaluation_is_up, save_is_up, damage = (requested > 0).tolist()
            self.meets_damage = damage and not self.is_done(step)
            self.stops = stops or self.meets_damage
            self.evaluates |= evaluation_is_up
            self._save_due |= save_is_up
        self._saves_now = self._save_due and not streaks.any()
        return looks

    @property
    def pauses(self) -> bool:
        """Whether anything comes before the next step."""
        return self.evaluates or self._saves_now or self.stops


class _Timer:
    """Tells when an interval in minutes has passed; never, for other units."""

    def __init__(self, interval: Interval) -> None:
        self._seconds = 60 * interval.count if interval.unit == "min" else math.inf
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    @property
    def is_up(self) -> bool:
        return time.monotonic() - self._since >= self._seconds


class Streaks:
    """How many steps in a row each peer has lost, now and at most; on the device.

    A step is lost if its loss is not finite or its cross-entropy above ``bound``.
    """

    def __init__(self, placement: Placement, bound: float, start: Start, most: int) -> None:
        self._names, self._most, device = placement.names, most, placement.device
        self._bound = bound
        self._now = torch.tensor([start.lost.get(name, 0) for name in self._names], device=device)
        self._longest = self._now

    def count(self, losses_KP: Tensor) -> None:
        """Count a step."""
        within = losses_KP[:, PARTS.index("cross_entropy")] <= self._bound  # false for NaN
        sound = losses_KP[:, 0].isfinite() & within  # [K]
        self._now = torch.where(sound, 0, self._now + 1)
        self._longest = torch.maximum(self._longest, self._now)

    def any(self) -> bool:
        """Whether a peer has lost the last step; this waits for the device."""
        return bool(self._now.any())

    def by_name(self) -> dict[str, int]:
        """Return the current streaks."""
        return dict(zip(self._names, self._now.tolist(), strict=True))

    def refuse_diverged(self, step: int) -> None:
        """Raise if a peer has lost too many steps in a row.

        Raises:
            DivergedError: the text names the peer.
        """
        for name, streak in zip(self._names, self._longest.tolist(), strict=True):
            if streak >= self._most:
                raise DivergedError(
                    f"the loss of {name} was not finite, or its cross-entropy above "
                    f"{self._bound:.0f}, for {streak} steps in a row by step {step} "
                    f"(--max-nonfinite {self._most}); {_REMEDY}"
                )


def _refuse_lost(peers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise if a peer's predictions are not finite in the last evaluation."""
    for name, metrics in peers.items():
        if metrics["nll"] is None:
            raise DivergedError(f"the predictions of {name} are not finite at the end; {_REMEDY}")


# ---------------------------------------------------------------- evaluation


def _evaluate_splits(
    peers: Sequence[Peer], data: Data, placement: Placement, stop: Stop, step: int, epoch: int
) -> EvaluationRecord | None:
    """Evaluate on the test split, and on the validation split if there is one; None if stopped."""
    splits = {"test": data.test} | ({"val": data.val} if data.val else {})
    found: list[dict[str, Any]] = []  # of the weights, and of their averages
    for averages in (False, True) if peers[0].average else (False,):
        measured: dict[str, Any] = {"test": None, "val": None}
        for name, images in splits.items():
            measured[name] = evaluate(
                peers, images, len(data.classes), placement, stop, averages=averages, split=name
            )
            if measured[name] is None:
                return None
        found.append(measured)
    return EvaluationRecord(step, epoch, **found[0], ema=found[1] if found[1:] else None)


@torch.no_grad()
def evaluate(
    peers: Sequence[Peer],
    images: ImageSet,
    classes: int,
    placement: Placement,
    stop: Stop | None = None,
    *,
    averages: bool = False,
    split: str = "evaluated",
) -> dict[str, Any] | None:
    """Measure every peer and the ensemble on all of ``images``, each image counted once.

    The networks are in training mode afterwards.

    Args:
        peers: those that are trained here.
        images: a split.
        classes: how many there are.
        placement: which rows are ours.
        stop: checked after each chunk on a CPU, and with a single process.
        averages: whether to measure the averages of their weights.
        split: its name, for messages.

    Returns:
        See ``metrics.finish``; the same in all processes. None if a process was asked to stop, or
        cannot read images that are not to be skipped: ``images.meets_damage`` says so in all.

    Raises:
        UsageError: none of the images could be read.
    """
    processes = placement.processes
    looks = stop and (processes.world_size == 1 or placement.device.type == "cpu")
    stops = False
    peers = sorted(peers, key=lambda peer: peer.name)
    trained = [peer.module.eval() for peer in peers]
    modules = [peer.average.module for peer in peers if peer.average] if averages else trained
    placement.broadcast_buffers(modules)
    sums = no_sums(len(placement.names), classes, placement.device)
    chunk = _EVALUATION_ROWS * placement.slices
    for count, x, y in images.in_chunks(chunk, placement.rows):
        if looks and stop:
            stops = bool(processes.all_reduce_max(stop.requested or images.meets_damage))
        if stops:
            break
        # Our slice of the last chunk may be empty, which not every network accepts.
        found = [module(x) if len(x) else x.new_zeros(0, classes) for module in modules]
        everyone = placement.gather(torch.stack(found), count)  # [K, B, C]
        if placement.counts_rows and len(x):
            sums += batch_sums(everyone, y)
    for module in trained:
        module.train()
    if images.waited is not None:  # others may have met images that cannot be read
        images.meets_damage = bool(processes.all_reduce_max(images.meets_damage))
    if stops or images.meets_damage:
        return None
    return finish(placement.sum_over_rows(sums), placement.names, classes, split)
