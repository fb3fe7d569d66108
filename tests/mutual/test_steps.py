"""Whole steps with other divergences, targets and gates, by every schedule, as the reference."""

import copy
import math
from typing import Any

import pytest
import torch

from dml_accel.data.batches import slices
from dml_accel.models.optim import make_optimizer
from dml_accel.mutual import reference
from dml_accel.mutual.pausing import behind, is_paused
from tests.helpers import Training
from tests.mutual.references import (
    Build,
    assert_as_reference,
    batch_of,
    link_rows,
    loss_options,
    nets_in_turn,
)

THREE = ("resnet8*3",)
HALF_LABELLED = {"labelled_fraction": 0.5, "kl_images": "labelled", "images": 64}
AVERAGES_TEACH = {"ema": 0.9, "teach_with": "ema"}


class Slow:
    """The networks of a run, trained by the reference."""

    def __init__(self, fast: Training) -> None:
        self.fast, self.nets = fast, nets_in_turn(fast)
        self.optimizers = [make_optimizer(net, fast.config.optim) for net in self.nets]

    def step(self, number: int, **changes: Any) -> None:
        """Take a step with both, and compare losses and states."""
        fast, config = self.fast, self.fast.config
        options = loss_options(config) | {"links": link_rows(fast)} | changes
        take, update = reference.step, config.method.update
        given: Any = [batch_of(fast, number, *rows) for rows in slices(8, config.optim.grad_accum)]
        if update == "sequential":
            take, given = reference.sequential_step, given[0]
        elif update == "official":
            turns = range(number * len(self.nets), (number + 1) * len(self.nets))
            take, given = reference.official_step, [batch_of(fast, turn, 0, 8) for turn in turns]
        elif update == "switch":
            options["pauses"] = True
        if config.method.teach_with == "ema":  # of the first step
            options["averages"] = [copy.deepcopy(net).eval() for net in self.nets]
        expected = take(self.nets, self.optimizers, given, **options)
        (found,) = fast.take(1, number)
        assert_as_reference(fast, self.nets, found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": THREE, "low_memory": True, "divergence": "renyi", "label_smoothing": 0.1},
        {"low_memory": True, "target": "best", "divergence": "renyi", "temperature": 2.0},
        {"grad_accum": 2, "target": "min-logit", "divergence": "jsd"},
        {"standardize": True, "temperature": 2.0, "kl_weight": 9.0, "ce_weight": 0.1},
        {"update": "sequential", "divergence": "dkd", "divergence_args": ("beta=2",)},
        {"update": "sequential", "target": "best"},
        {"update": "official", "divergence": "dkd"},
        AVERAGES_TEACH | {"cohort": THREE, "divergence": "jeffreys"},
        AVERAGES_TEACH | {"target": "mean-logit-all"},
        HALF_LABELLED | {"divergence": "dkd"},
        HALF_LABELLED | {"divergence": "renyi", "gate": "correct"},
        HALF_LABELLED | {"update": "switch"},
    ],
    ids=str,
)
def test_a_step_equals_the_reference(training: Build, changes: dict[str, Any]) -> None:
    slow = Slow(training(**changes))
    if "labelled_fraction" in changes:
        assert -1 in slow.fast.data.train.batch(0, 8, 0, 8)[1]
    slow.step(0)


def test_a_leader_learns_from_the_others_with_a_weight_that_grows(training: Build) -> None:
    # 5 steps an epoch, 2 epochs: t is 1/10, 5/10 and 1.
    ramp = {"kl_ramp": "sigmoid", "kl_warmup": 2, "kl_weight": 2.0}
    links = {"links": "leader", "target": "mean-logit", "temperature": 3.0}
    slow = Slow(training(images=40, cohort=THREE, **ramp, **links))
    assert link_rows(slow.fast) == [[0, 1, 0], [1, 0, 0], [1, 1, 0]]
    for number, done in ((0, 0.1), (4, 0.5), (10, 1.0)):
        slow.step(number, kl_weight=2 * math.exp(-5 * (1 - done) ** 2))


# ---------------------------------------------------------------- a schedule that pauses


def sharpen(nets: list[torch.nn.Module], factor: float) -> None:
    """Make the predictions of the first network sharp, or mend them."""
    with torch.no_grad():
        nets[0].get_classifier().weight.mul_(factor)


@pytest.mark.parametrize("changes", [{}, {"grad_accum": 2, "low_memory": True}], ids=str)
def test_the_better_peer_pauses_while_the_two_are_far_apart(
    training: Build, changes: dict[str, Any]
) -> None:
    slow = Slow(training(update="switch", ema=0.9, **changes))
    fast = [peer.module for peer in slow.fast.peers]
    paused = []
    for number, factor in enumerate((1, 100, 0.01)):
        for nets in (fast, slow.nets):
            sharpen(nets, factor)
        before = slow.fast.states()
        slow.step(number)
        after = slow.fast.states()
        paused.append([name for name in before if same(before[name], after[name])])
    assert paused[0] == paused[2] == [] and len(paused[1]) == 1


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all of a peer is as it was: weights, running statistics, momentum and average."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def by_hand(p_0: float, p_1: float) -> int | None:
    """Who pauses of two peers that give the label these posteriors, of two classes."""
    z = torch.tensor([[[p, 1 - p]] for p in (p_0, p_1)]).double().log()
    return reference.pausing(z[0], z[1], torch.tensor([0]))


def test_who_pauses_by_hand() -> None:
    # Distances 2 (1 - p): .2 and 1.8, 1.6 apart; 1.8 - exp(-.1) .2 = 1.619: nobody.
    assert by_hand(0.9, 0.1) is None
    # .8 and 1.2, .4 apart; 1.2 - exp(-.4) .8 = .664: nobody. The gap is at most the difference of
    # distances on one row, so it takes rows on which they differ in opposite ways.
    assert by_hand(0.6, 0.4) is None
    p = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.9, 0.1]]]).double()
    # Rows of label 0: distances (.2 + 1.4) / 2 = .8 and (1.6 + .2) / 2 = .9; (1.4 + 1.2) / 2 = 1.3
    # apart, above .9 - exp(-.8 / 1.7) .8 = .4.
    assert reference.pausing(p[0].log(), p[1].log(), torch.tensor([0, 0])) == 0
    assert reference.pausing(p[1].log(), p[0].log(), torch.tensor([0, 0])) == 1
    # Without the second row's label it is the first case.
    assert reference.pausing(p[0].log(), p[1].log(), torch.tensor([0, -1])) is None


def test_who_pauses_equals_the_reference() -> None:
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        sizes = 4 * torch.rand(2, 1, 1, generator=generator, dtype=torch.float64)
        z = sizes * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, 5, (6,), generator=generator)
        paused = is_paused(behind(z, labels).mean(1)).tolist()
        found.append(paused.index(True) if any(paused) else None)
        assert found[-1] == reference.pausing(z[0], z[1], labels) and sum(paused) < 2
    assert set(found) == {0, 1, None}
    for unlabelled in (z, z * torch.nan):  # nobody is better, nobody pauses
        assert not is_paused(behind(unlabelled, torch.full((6,), -1)).mean(1)).any()
