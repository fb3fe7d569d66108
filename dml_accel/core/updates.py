"""Update schedules: which peer is updated when, and what one optimizer step of each costs.

These are the facts that checking and planning need; ``mutual.step`` has the steps themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateSchedule:
    """One update schedule.

    Attributes:
        name: the value of ``--update``.
        text: what it does, for ``--help``.
        forward_passes: forward passes of one peer over one batch, in one step of K peers.
        batches_per_step: batches that one optimizer step of K peers uses.
        takes_turns: peers are updated one after the other, so every process holds all of them.
        splits_batches: whether a batch may be computed in parts (``--grad-accum``).
        sums_kl: the KL terms of several teachers are summed, not averaged.
        pauses: one of two peers may be left as it is in a step.
    """

    name: str
    text: str
    forward_passes: Callable[[int], int]
    batches_per_step: Callable[[int], int] = lambda peers: 1
    takes_turns: bool = False
    splits_batches: bool = True
    sums_kl: bool = False
    pauses: bool = False

    def cost(self, peers: int) -> float:
        """Return the cost of a step in forward passes of the whole cohort over one batch.

        A backward pass counts as two forward passes.
        """
        return (self.forward_passes(peers) + 2 * peers) / peers


_SCHEDULES = (
    UpdateSchedule(
        "simultaneous",
        "all peers at once, from the same predictions",
        forward_passes=lambda peers: peers,
    ),
    UpdateSchedule(
        "sequential",
        "one peer after the other in the order given (the paper's Algorithm 1); each predicts the "
        "batch again for the peers after it",
        forward_passes=lambda peers: 2 * peers - 1,
        takes_turns=True,
        splits_batches=False,
    ),
    UpdateSchedule(
        "official",
        "one peer after the other, each on a batch of its own, with the KL terms summed (the "
        "authors' code)",
        forward_passes=lambda peers: peers**2,
        batches_per_step=lambda peers: peers,
        takes_turns=True,
        sums_kl=True,
    ),
    UpdateSchedule(
        "switch",
        "two peers at once, but the better one pauses while the other is too far behind it "
        "(SwitOKD)",
        forward_passes=lambda peers: peers,
        pauses=True,
    ),
)
UPDATE_SCHEDULES = {schedule.name: schedule for schedule in _SCHEDULES}
