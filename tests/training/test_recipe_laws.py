"""The laws hold for a recipe with everything in it: AdamW, cosine, RandAugment, mixup, averages."""

from typing import Any

import pytest
import torch

from dml_accel.core.config import Config
from dml_accel.data.sources import Source
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.step import PARTS
from dml_accel.training import checkpoint
from tests.helpers import Training, tiny_config

MODERN: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 0.002,
    "wd_exclude_norm_bias": True,
    "lr_schedule": "cosine",
    "epochs": 1,
    "warmup": 0.01,
    "augment": ("crop", "randaugment", "erasing"),
    "mixup": 0.4,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.9,
    "max_steps": None,
}
EVERYTHING = {
    "as it is": {},
    "averages teach": {"teach_with": "ema"},
    "the last exchange teaches": {"exchange_every": 2},
    "low memory": {"low_memory": True},
    "accumulated and clipped": {"grad_accum": 3, "clip_norm": 0.5},
    "sequential": {"update": "sequential"},
    "official": {"update": "official"},
    "one peer by SGD": {"peer_opt": ("resnet8-1:optimizer=sgd,lr=0.05",)},
}


def modern(**changes: object) -> Config:
    return tiny_config(**MODERN | changes)


def packed(peers: list[Peer]) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """All state of the peers, as a checkpoint has it."""
    return {peer.name: checkpoint.pack(peer) for peer in peers}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, (tensors, rest) in one.items():
        assert tensors.keys() == other[name][0].keys()
        for key, value in tensors.items():
            assert torch.equal(value, other[name][0][key]), (name, key)
        assert rest == other[name][1]


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(name: str, digits: Source) -> None:
    config = modern(**EVERYTHING[name])
    whole = Training(config, digits)
    losses = whole.take(5)
    first = Training(config, digits)
    first.take(3)
    saved = packed(first.peers)
    assert any(key.startswith("ema.") for tensors, _ in saved.values() for key in tensors)
    resumed = Training(config, digits)
    for peer in resumed.peers:
        checkpoint.unpack(peer, *saved[peer.name])
    again = resumed.take(2, start=3)
    assert torch.equal(torch.stack(losses[3:]), torch.stack(again))
    assert_equal(packed(whole.peers), packed(resumed.peers))


def test_the_order_of_the_cohort_does_not_matter(digits: Source) -> None:
    both = []
    for cohort in (("resnet8", "wrn_16_2"), ("wrn_16_2", "resnet8")):
        training = Training(modern(cohort=cohort), digits)
        both.append((training.take(3), packed(training.peers)))
    assert torch.equal(torch.stack(both[0][0]), torch.stack(both[1][0]))
    assert_equal(both[0][1], both[1][1])


def test_without_a_weight_every_peer_trains_as_if_alone(digits: Source) -> None:
    together = Training(modern(kl_weight=0.0), digits)
    alone = Training(modern(cohort=("resnet8",)), digits)
    losses, own = together.take(3), alone.take(3)
    assert torch.equal(torch.stack(losses)[:, 0], torch.stack(own)[:, 0])
    assert_equal({"resnet8-0": packed(together.peers)["resnet8-0"]}, packed(alone.peers))


def test_a_step_that_a_peer_skips_leaves_no_trace(digits: Source) -> None:
    training = Training(modern(), digits)
    training.take(2)
    before = packed(training.peers)
    spoiled, other = training.peers
    hook = spoiled.net.register_forward_hook(lambda _, inputs, logits: logits * float("nan"))
    (losses,) = training.take(1, start=2)
    hook.remove()
    assert not losses[0, PARTS.index("loss")].isfinite() and losses[1].isfinite().all()
    after = packed(training.peers)
    assert_equal({spoiled.name: before[spoiled.name]}, {spoiled.name: after[spoiled.name]})
    was, now = before[other.name][0], after[other.name][0]
    moved = [key for key, value in now.items() if not torch.equal(value, was[key])]
    for kind in ("model.", "optimizer.", "ema."):
        assert any(key.startswith(kind) for key in moved), kind
