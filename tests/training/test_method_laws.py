"""The laws hold for every method by its name: it resumes bit for bit, and order does not matter."""

from typing import Any

import pytest
import torch

from dml_accel.analysis.methods import METHODS
from dml_accel.core.config import Config
from dml_accel.data.sources import Source
from dml_accel.training import checkpoint
from tests.helpers import Training, tiny_config

# Those that need more than a cohort have tests of their own.
NAMES = [name for name in METHODS if name not in ("distill", "semi", "ensemble-distill")]
# The last network on the command line is the leader, so its order matters there.
ORDERLY = ("renyi", "dkd", "kdcl-naive", "switokd")


def config_of(name: str, **changes: Any) -> Config:
    # With a warm-up of more than the steps, so that the weight of a step depends on its number.
    flags = METHODS[name].flags(epochs=40)
    peers = max(2, METHODS[name].least)
    return tiny_config(**{"cohort": (f"resnet8*{peers}",), **flags, "epochs": 40, **changes})


def packed(training: Training) -> dict[str, Any]:
    """All state of the peers, as a checkpoint has it."""
    return {peer.name: checkpoint.pack(peer) for peer in training.peers}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(name: str, digits: Source) -> None:
    config = config_of(name)
    whole, resumed = Training(config, digits), Training(config, digits)
    whole.take(1)
    for peer in resumed.peers:
        tensors, rest = packed(whole)[peer.name]
        checkpoint.unpack(peer, {key: value.clone() for key, value in tensors.items()}, rest)
    (straight,), (again,) = whole.take(1, start=1), resumed.take(1, start=1)
    assert torch.equal(straight, again)
    assert (straight[:, 2] > 0).any() or name == "independent"  # the method does something
    for name_, (state, rest) in packed(whole).items():
        theirs, others = packed(resumed)[name_]
        assert rest == others
        for key, value in state.items():
            assert torch.equal(value, theirs[key]), (name_, key)


@pytest.mark.parametrize("name", ORDERLY)
def test_the_order_of_the_cohort_does_not_matter(name: str, digits: Source) -> None:
    both = []
    for cohort in (("resnet8", "wrn_16_2"), ("wrn_16_2", "resnet8")):
        training = Training(config_of(name, cohort=cohort), digits)
        both.append((training.take(2), training.states()))
    assert torch.equal(torch.stack(both[0][0]), torch.stack(both[1][0]))
    for peer, state in both[0][1].items():
        for key, value in state.items():
            assert torch.equal(value, both[1][1][peer][key]), (peer, key)
