"""Combinations of targets, divergences, standardized logits, gates and links: as the reference."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_accel.core.config import Config
from dml_accel.core.lessons import DIVERGENCES, TARGETS
from dml_accel.mutual import reference
from dml_accel.mutual.losses import mutual_loss
from dml_accel.mutual.teaching import Teaching
from tests.mutual.references import B, C, K

# Numbers that are not the usual ones.
NUMBERS = {
    "jsd": {"beta": 0.3},
    "renyi": {"alpha": 0.5},
    "dkd": {"alpha": 0.5, "beta": 3.0},
    "nkd": {"gamma": 0.7, "temperature": 3.0},
    "ttm": {"gamma": 0.4},
    "wttm": {"gamma": 0.4},
}


def temperature_of(divergence: str) -> dict[str, float]:
    return {} if DIVERGENCES[divergence].own_temperature else {"temperature": 3.0}


OF_PEERS = [
    {"divergence": name} | changes | temperature_of(name)
    for name in DIVERGENCES
    for changes in (
        {"kl_weight": 0.3, "kl_reduction": "sum", "divergence_args": NUMBERS.get(name)},
        {"standardize": True, "gate": "correct", "ce_weight": 0.1},
    )
]
OF_ONE_TARGET = [
    {"target": target, "divergence": divergence, "temperature": 2.0} | changes
    for target, divergence in itertools.product(TARGETS, DIVERGENCES)
    if TARGETS[target].is_single
    and not DIVERGENCES[divergence].own_temperature
    and (target != "mean-prob" or divergence == "kl")
    for changes in ({}, {"standardize": True})
    if changes or divergence in ("kl", "dkd")
]


def same_as(slow: list[Tensor], total: Tensor, z: Tensor, peers: list[Tensor]) -> None:
    """Values and gradients, [K, B, C], are those of the reference."""
    found = total.mean(1)
    torch.testing.assert_close(found, torch.stack(slow), rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad(found.sum(), z)
    theirs = torch.autograd.grad(torch.stack(slow).sum(), peers)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [*OF_PEERS, *OF_ONE_TARGET], ids=str)
def test_losses_equal_the_reference(logits: Tensor, labels: Tensor, method: dict[str, Any]) -> None:
    z = logits.clone().requires_grad_()
    peers = [one.clone().requires_grad_() for one in logits]
    losses = mutual_loss(z, labels, **method)
    same_as([reference.loss(k, peers, labels, **method) for k in range(K)], losses.total, z, peers)


def test_some_teachers_are_right_and_some_are_wrong(logits: Tensor, labels: Tensor) -> None:
    assert 0 < (logits.argmax(-1) == labels).sum() < K * B  # so both sides of the gate are met


NAMES = ["a", "b", "c"]
LINKS = {
    "a": {"a": 0.0, "b": 0.5, "c": 2.0, "frozen-0": 1.0},
    "b": {"a": 0.3, "b": 0.0, "c": 0.0, "frozen-0": 0.0},
    "c": {"a": 0.0, "b": 0.0, "c": 0.0, "frozen-0": 0.0},  # learns from nobody
}


@pytest.mark.parametrize(
    ("linked", "method"),
    [
        *((False, {"divergence": name}) for name in DIVERGENCES),
        *((True, {"divergence": name, "gate": "correct"}) for name in DIVERGENCES),
        (True, {"divergence": "renyi", "kl_reduction": "sum", "standardize": True}),
        (True, {"divergence": "dkd", "kl_reduction": "sum", "temperature": 3.0}),
        *((False, {"target": target}) for target in TARGETS if target != "peers"),
        (True, {"target": "mean-prob"}),
        (True, {"target": "mean-logit", "divergence": "renyi"}),
        (False, {"target": "min-logit", "divergence": "dkd", "standardize": True}),
    ],
    ids=str,
)
def test_linked_and_frozen_teachers_and_rows_that_are_not_finite_equal_the_reference(
    logits: Tensor, labels: Tensor, linked: bool, method: dict[str, Any]
) -> None:
    config = Config(**method, frozen_peers=("x",)).method
    teaching = Teaching(config, NAMES, ["frozen-0"], LINKS if linked else None)
    frozen = 2 * torch.randn(1, B, C, generator=torch.Generator().manual_seed(3)).double()
    taught = logits.clone()
    taught[1, 2, 0] = torch.nan  # as if averages taught
    frozen[0, 0, 1] = -torch.inf
    z = logits.clone().requires_grad_()
    everyone = teaching.contributions(taught, labels)
    theirs = teaching.contributions(frozen, labels)
    total = torch.cat(
        [
            teaching.losses(
                z[[place]],
                labels,
                teaching.targets_of(place, everyone, labels, theirs),
                kl_weight=1.0,
                label_weight=None,
            ).total
            for place in range(K)
        ]
    )
    peers = [one.clone().requires_grad_() for one in logits]
    rows = [list(row.values()) for row in LINKS.values()] if linked else None
    slow = [
        reference.loss(
            k, peers, labels, averages=list(taught), frozen=list(frozen), links=rows, **method
        )
        for k in range(K)
    ]
    same_as(slow, total, z, peers)
