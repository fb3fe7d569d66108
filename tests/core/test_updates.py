"""Update schedules: what a step of each costs, by hand."""

import pytest

from dml_accel.core.config import Config
from dml_accel.core.updates import UPDATE_SCHEDULES


@pytest.mark.parametrize("peers", [1, 2, 3, 8])
def test_costs_by_hand(peers: int) -> None:
    # In forward passes of the whole cohort over one batch; a backward pass is two of them.
    cost = {name: one.cost(peers) for name, one in UPDATE_SCHEDULES.items()}
    assert cost["simultaneous"] == 3.0
    # All but the last peer predict the batch once more.
    assert cost["sequential"] == pytest.approx(3 + (peers - 1) / peers)
    # Each peer's batch is predicted by all peers.
    assert cost["official"] == pytest.approx(2 + peers)
    assert cost["switch"] == 3.0


@pytest.mark.parametrize(
    ("update", "forward_passes", "batches"),
    [
        ("simultaneous", [1, 3], [1, 1]),
        ("sequential", [1, 5], [1, 1]),
        ("official", [1, 9], [1, 3]),
        ("switch", [1, 3], [1, 1]),
    ],
)
def test_forward_passes_and_batches_of_one_peer_and_of_three(
    update: str, forward_passes: list[int], batches: list[int]
) -> None:
    schedule = UPDATE_SCHEDULES[update]
    assert [schedule.forward_passes(peers) for peers in (1, 3)] == forward_passes
    assert [schedule.batches_per_step(peers) for peers in (1, 3)] == batches


def test_what_each_schedule_goes_with() -> None:
    facts = {
        name: (one.takes_turns, one.splits_batches, one.sums_kl, one.pauses)
        for name, one in UPDATE_SCHEDULES.items()
    }
    assert facts == {
        "simultaneous": (False, True, False, False),
        "sequential": (True, False, False, False),
        "official": (True, True, True, False),
        "switch": (False, True, False, True),
    }
    for name, one in UPDATE_SCHEDULES.items():
        method = Config(update=name).method
        assert method.schedule is one and one.name == name
        assert method.sums_kl == one.sums_kl
        assert Config(update=name, kl_reduction="sum").method.sums_kl
