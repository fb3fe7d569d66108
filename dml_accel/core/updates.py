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
        takes_turns: peers are updated one after the other, so every process holds all of them.
        splits_batches: whether a batch may be computed in parts (``--grad-accum``).
        sums_kl: the KL terms of several teachers are summed, not averaged.
        batches_per_step: batches that one optimizer step of K peers uses.
        forward_passes: forward passes of one peer over one batch, in one step of K peers.
    """

    name: str
    text: str
    takes_turns: bool
    splits_batches: bool
    sums_kl: bool
    batches_per_step: Callable[[int], int]
    forward_passes: Callable[[int], int]

    def cost(self, peers: int) -> float:
        """Return the cost of a step in forward passes of the whole cohort over one batch.

        A backward pass counts as two forward passes.
        """
        return (self.forward_passes(peers) + 2 * peers) / peers


UPDATE_SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        UpdateSchedule(
            "simultaneous",
            "all peers at once, from the same predictions",
            takes_turns=False,
            splits_batches=True,
            sums_kl=False,
            batches_per_step=lambda peers: 1,
            forward_passes=lambda peers: peers,
        ),
        UpdateSchedule(
            "sequential",
            "one peer after the other in the order given (the paper's Algorithm 1); each predicts "
            "the batch again for the peers after it",
            takes_turns=True,
            splits_batches=False,
            sums_kl=False,
            batches_per_step=lambda peers: 1,
            forward_passes=lambda peers: 2 * peers - 1,
        ),
        UpdateSchedule(
            "official",
            "one peer after the other, each on a batch of its own, with the KL terms summed (the "
            "authors' code)",
            takes_turns=True,
            splits_batches=True,
            sums_kl=True,
            batches_per_step=lambda peers: peers,
            forward_passes=lambda peers: peers**2,
        ),
    )
}
