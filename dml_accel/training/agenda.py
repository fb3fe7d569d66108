"""What comes before the next step: a checkpoint, an evaluation, the end, the end of a lost peer."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import Config, Interval
from dml_accel.distributed.launch import Stop
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.step import PARTS

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


def steps_to_take(config: Config, images: int) -> int:
    """Optimizer steps of a whole run over ``images`` training images."""
    steps = config.epochs * (images // config.batch_size)
    return min(steps, config.max_steps or steps)


def evaluation_follows(config: Config, images: int, step: int) -> bool:
    """Whether an evaluation comes after ``step`` optimizer steps, whatever the clock says."""
    last = step == steps_to_take(config, images)
    return step > 0 and (last or config.eval_interval.due(step, images // config.batch_size))


class Agenda:
    """What comes before the next step: a checkpoint, an evaluation, the end.

    Attributes:
        evaluates: whether an evaluation is due.
        stops: whether any process was asked to stop.
    """

    def __init__(
        self, config: Config, placement: Placement, images: int, start: Start, stop: Stop
    ) -> None:
        self._config, self._images, self._stop = config, images, stop
        self._processes = placement.processes
        self._on_cpu = placement.device.type == "cpu"
        self._evaluations, self._saves = _Clock(config.eval_interval), _Clock(config.save_interval)
        self._kept = start.step if start.kept else None
        self.evaluates = evaluation_follows(config, images, start.step)
        # What goes on from elsewhere has a checkpoint of its own first; what begins has none.
        self._save_due = self._saves_now = start.step > 0 and not start.kept
        self.stops = bool(self._processes.largest(stop.asked))

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint is to be kept."""
        return (self._saves_now or self.stops) and self._kept != step

    def has_kept(self, step: int) -> None:
        """Hear that it was; that took a while, in which a stop may have been asked for."""
        self._kept, self._save_due = step, False
        self._saves.restart()
        self.stops = bool(self._processes.largest(self._stop.asked))

    def has_evaluated(self) -> None:
        """Hear that it was evaluated."""
        self._evaluations.restart()

    def is_done(self, step: int) -> bool:
        """Whether all steps are taken."""
        return step >= steps_to_take(self._config, self._images)

    def asks(self) -> list[bool]:
        """Return what this process has to say: stop, evaluate, save; the clock is the first's."""
        speaks = self._processes.rank == 0
        clocks = (self._evaluations, self._saves)
        return [self._stop.asked, *(speaks and clock.time_is_up for clock in clocks)]

    def go_on(self, step: int, asked: Tensor, streaks: "Streaks") -> bool:
        """Take up what is due after a step; return whether the device may be waited for.

        Args:
            step: optimizer steps taken.
            asked: how many processes ask for what ``asks`` says, [3] on the device.
            streaks: of steps that peers lost.
        """
        per_epoch = self._images // self._config.batch_size
        self.evaluates = evaluation_follows(self._config, self._images, step)
        self._save_due |= self.is_done(step) or self._config.save_interval.due(step, per_epoch)
        # Looking makes an accelerator wait, so that it is looked at less often there.
        on_time = self.evaluates or self._save_due or step % _STEPS_BETWEEN_LOOKS == 0
        looks = self._on_cpu or on_time
        if looks or self._processes.world_size == 1:
            self.stops, evaluation_is_up, save_is_up = (asked > 0).tolist()
            self.evaluates |= evaluation_is_up
            self._save_due |= save_is_up
        self._saves_now = self._save_due and not streaks.any()
        return looks

    @property
    def pauses(self) -> bool:
        """Whether anything comes before the next step."""
        return self.evaluates or self._saves_now or self.stops


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


class Streaks:
    """How many steps in a row each peer has lost up to now, and at most; on the device."""

    def __init__(self, placement: Placement, classes: int, start: Start, most: int) -> None:
        self._names, self._most, device = placement.names, most, placement.device
        self._bound = _BOUND * math.log(classes)
        self._now = torch.tensor([start.lost.get(name, 0) for name in self._names], device=device)
        self._longest = self._now

    def count(self, losses_KP: Tensor) -> None:
        """Count a step: lost where the loss is not finite, or its cross-entropy out of bounds."""
        within = losses_KP[:, PARTS.index("cross_entropy")] <= self._bound
        sound = losses_KP[:, 0].isfinite() & within
        self._now = torch.where(sound, 0, self._now + 1)
        self._longest = torch.maximum(self._longest, self._now)

    def any(self) -> bool:
        """Whether a peer has lost the last step; this waits for the device."""
        return bool(self._now.any())

    def by_name(self) -> dict[str, int]:
        """Return the streaks up to now."""
        return dict(zip(self._names, self._now.tolist(), strict=True))

    def refuse_diverged(self, step: int) -> None:
        """Raise where a peer has lost too many.

        Raises:
            DivergedError: it is named.
        """
        for name, streak in zip(self._names, self._longest.tolist(), strict=True):
            if streak >= self._most:
                raise DivergedError(
                    f"the loss of {name} was not finite, or its cross-entropy above "
                    f"{self._bound:.0f}, for {streak} steps in a row by step {step} "
                    f"(--max-nonfinite {self._most}); {_REMEDY}"
                )


def refuse_lost(peers: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an end at which a peer predicts nothing.

    Args:
        peers: the last evaluation's metrics by name.

    Raises:
        DivergedError: predictions are not finite; a peer is named.
    """
    for name, metrics in peers.items():
        if metrics["nll"] is None:
            raise DivergedError(f"the predictions of {name} are not finite at the end; {_REMEDY}")
