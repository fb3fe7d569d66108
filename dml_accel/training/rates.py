"""The learning rates of a step: by the flags, or by a schedule of the caller's."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dml_accel.core.config import OptimConfig
from dml_accel.core.errors import UsageError, one_line
from dml_accel.models.schedules import learning_rate
from dml_accel.mutual.peer import Peer

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class StepRates:
    """The learning rates of one step.

    Attributes:
        lr: of peers without one of their own.
        lrs: of every peer, in name order; of several groups of parameters, that of the first.
        set: what each peer is given: its rate, or the factor of the rates of its own optimizer.
    """

    lr: float
    lrs: Mapping[str, float]
    set: Mapping[str, float]


@dataclass
class Rates:
    """The learning rates of all steps, a function of the step alone.

    Attributes:
        optim: of the run.
        names: of all peers, in name order.
        steps_per_epoch: of the run.
        schedule: returns the factor of the highest rates by step, from 0; None: by the flags.
        own: rates of the caller's optimizers, of the first group, by peer; empty without any.
    """

    optim: OptimConfig
    names: Sequence[str]
    steps_per_epoch: int
    schedule: Schedule | None = None
    own: Mapping[str, float] = field(default_factory=dict)
    _unit: OptimConfig = field(init=False)
    _of_peers: dict[str, OptimConfig] = field(init=False)

    @classmethod
    def of(
        cls,
        optim: OptimConfig,
        names: Sequence[str],
        peers: Sequence[Peer],
        steps_per_epoch: int,
        schedule: Schedule | None = None,
    ) -> "Rates":
        """Return the rates of a run.

        Args:
            optim: of the run.
            names: of all peers, in name order.
            peers: those of this process; all of them, where optimizers are the caller's.
            steps_per_epoch: of the run.
            schedule: see above.
        """
        own = {peer.name: peer.rates[0] for peer in peers if peer.rates}
        return cls(optim, names, steps_per_epoch, schedule, own)

    def __post_init__(self) -> None:
        # Of an optimizer of the caller's, the flags say how its rates fall, not how high they are.
        self._unit = dataclasses.replace(self.optim, lr=1.0) if self.own else self.optim
        self._of_peers = {name: self._unit.of_peer(name) for name in self.names}

    def __call__(self, step: int) -> StepRates:
        """Return the rates of a step, from 0.

        Raises:
            UsageError: the schedule returns no factor.
        """
        unit, of_peers = self._unit, self._of_peers
        if self.schedule is None:
            lr = learning_rate(unit, step, self.steps_per_epoch)
            rates = {
                name: learning_rate(one, step, self.steps_per_epoch)
                for name, one in of_peers.items()
            }
        else:
            factor = factor_of(self.schedule, step)
            lr = factor * unit.highest_lr
            rates = {name: factor * one.highest_lr for name, one in of_peers.items()}
        if not self.own:
            return StepRates(lr, rates, rates)
        lrs = {name: rates[name] * rate for name, rate in self.own.items()}
        return StepRates(next(iter(lrs.values())), lrs, rates)


def factor_of(schedule: Schedule, step: int) -> float:
    """Return what a schedule of the caller's says of a step.

    Raises:
        UsageError: it fails, or returns what is no finite number of at least 0.
    """
    try:
        found: Any = schedule(step)
        factor = float(found)
    except Exception as error:  # whatever the caller's function raises
        raise UsageError(f"schedule({step}) fails: {one_line(error) or repr(error)}") from error
    if not (math.isfinite(factor) and factor >= 0):
        raise UsageError(
            f"schedule({step}) is {factor:g}; it must be the factor of the learning rate of a "
            "step, a finite number of at least 0"
        )
    return factor
