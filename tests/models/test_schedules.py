"""The learning rate of a step: worked out by hand, and as torch's and timm's schedulers have it."""

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from dml_accel.core.config import Config, OptimConfig
from dml_accel.core.errors import UsageError
from dml_accel.models.schedules import learning_rate, what_never_falls

STEPS = 10  # of an epoch; runs have 10 epochs and a rate of 1


def of(**changes: object) -> OptimConfig:
    return Config(**({"lr": 1.0, "epochs": 10} | changes)).optim


COSINE = {"lr_schedule": "cosine"}
POLY = {"lr_schedule": "poly", "lr_power": 2.0}
BY_EPOCH = {"lr_every": "epoch"}


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"lr_step": 3}, {0: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 99: 0.001}),
        ({"warmup": 2.0}, {0: 0.05, 9: 0.5, 18: 0.95, 19: 1, 20: 1, 99: 1}),
        ({"warmup": 0.25}, {0: 0.4, 1: 0.8, 2: 1, 3: 1}),
        # The warm-up takes no notice of drops within it, which are counted from the start.
        ({"warmup": 2.0, "lr_step": 1}, {10: 0.55, 19: 1, 20: 0.01, 30: 0.001}),
        ({"warmup": 4.0} | BY_EPOCH, {0: 0.25, 9: 0.25, 10: 0.5, 39: 1, 40: 1}),
        ({"warmup": 2.5} | BY_EPOCH | COSINE, {0: 0.4, 19: 0.8, 29: 1, 30: 0.98907380}),
        (
            {"lr_schedule": "milestones", "lr_milestones": (3, 4.5), "lr_gamma": 0.2},
            {0: 1, 29: 1, 30: 0.2, 44: 0.2, 45: 0.04, 99: 0.04},
        ),
        (COSINE, {0: 1, 25: 0.85355339, 50: 0.5, 75: 0.14644661, 99: 0.00024672}),
        (
            COSINE | {"warmup": 2.0, "lr_min": 0.1},
            {0: 0.05, 19: 1, 20: 1, 60: 0.55, 80: 0.23180195},
        ),
        (COSINE | BY_EPOCH, {9: 1, 50: 0.5, 59: 0.5, 99: 0.02447174}),
        (POLY, {0: 1, 25: 0.5625, 50: 0.25, 99: 0.0001}),
        (POLY | {"lr_min": 0.2}, {0: 1, 50: 0.4, 90: 0.208}),
        (POLY | BY_EPOCH, {9: 1, 10: 0.81, 99: 0.01}),
        # The number of steps ends a run, not its schedule.
        (COSINE | {"max_steps": 60}, {50: 0.5}),
        ({"lr_schedule": "constant", "warmup": 1.0}, {0: 0.1, 10: 1, 99: 1}),
    ],
    ids=str,
)
def test_a_rate_is_the_one_worked_out_by_hand(changes: dict, rates: dict[int, float]) -> None:
    optim = of(**changes)
    found = {step: learning_rate(optim, step, STEPS) for step in rates}
    assert found == pytest.approx(rates, rel=1e-6)
    peer = of(**changes, peer_opt=("a-0:lr=3",)).of_peer("a-0")
    if optim.lr_min == 0:
        assert learning_rate(peer, 30, STEPS) == pytest.approx(3 * learning_rate(optim, 30, STEPS))


def test_a_milestone_within_an_epoch_comes_at_its_step() -> None:
    # 0.07 * 100 is more than 7 to a computer, 7 / 100 is 0.07.
    for mark in range(1, 100):
        optim = of(lr_schedule="milestones", lr_milestones=(float(f"{mark / 100:.2f}"),))
        assert [learning_rate(optim, mark - back, 100) for back in (1, 0)] == [1, 0.1], mark


def test_rates_are_those_of_torch_and_timm() -> None:
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)

    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd := optimizer(), 10, 0.1)
    for epoch in range(10):
        rate = learning_rate(of(lr_min=0.1, **COSINE, **BY_EPOCH), epoch * STEPS + 4, STEPS)
        assert rate == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step(), cosine.step()
    poly = torch.optim.lr_scheduler.PolynomialLR(sgd := optimizer(), 100, 0.9)
    for step in range(100):
        rate = learning_rate(of(lr_schedule="poly", lr_power=0.9), step, STEPS)
        assert rate == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step(), poly.step()
    warm = {"t_in_epochs": False, "warmup_t": 20, "warmup_prefix": True}
    timms = CosineLRScheduler(sgd := optimizer(), 80, lr_min=0.1, **warm)
    for step in range(20, 100):  # its warm-up begins at a rate of its own
        timms.step_update(step)
        rate = learning_rate(of(lr_min=0.1, warmup=2.0, **COSINE), step, STEPS)
        assert rate == pytest.approx(sgd.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 4}, "it drops every --lr-step 60 epochs, and the run has 4 epochs; "
         "--lr-schedule cosine lets it fall, or --lr-step 1"),
        ({"epochs": 200, "max_steps": 95}, "the run has 10 epochs; --lr-schedule cosine with "
         "--epochs 10 lets it fall, or --lr-step 3"),
        ({"epochs": 1}, "the run has 1 epoch; --lr-schedule cosine lets it fall"),
        ({"lr_schedule": "milestones", "lr_milestones": (10, 20)}, "it drops at --lr-milestones 10 "
         "20, and the run has 10 epochs; --lr-schedule cosine lets it fall"),
        ({"lr_step": 1, "warmup": 2.0, "max_steps": 15}, "never falls: --max-steps ends the run "
         "within --warmup 2; lower --warmup"),
        (COSINE | {"warmup": 2.0, "max_steps": 20}, "--max-steps ends the run within --warmup 2"),
        (COSINE | BY_EPOCH | {"epochs": 1}, "never falls: with --lr-every epoch it falls one epoch "
         "after --warmup 0, and the run has 1 epoch; --lr-every step lets it fall"),
        (POLY | BY_EPOCH | {"warmup": 5.0, "epochs": 6}, "one epoch after --warmup 5, and the run "
         "has 6 epochs; --lr-every step lets it fall"),
        (COSINE | BY_EPOCH | {"max_steps": 9}, "a higher --max-steps lets it fall"),
        (COSINE | {"lr_min": 1.0}, "never falls: --lr-min 1 is --lr itself; lower it"),
        (POLY | {"lr_min": 1.0, "max_steps": 5}, "never falls: --lr-min 1 is --lr itself"),
        (POLY | {"epochs": 1, "warmup": 0.9}, "one step is left after --warmup 0.9; more --epochs"),
        ({"lr_gamma": 1.0, "lr_step": 3}, "never falls: --lr-gamma 1 keeps it where it is; "
         "--lr-schedule cosine lets it fall, or --lr-gamma 0.1"),
        ({"lr_gamma": 1.0, "epochs": 1} | BY_EPOCH, "--lr-gamma 1 keeps it where it is; "
         "--lr-schedule cosine and --lr-every step let it fall"),
        (COSINE | {"max_steps": 45}, "hardly fallen when --max-steps ends the run: 0.594 of 1, "
         "because --lr-schedule cosine falls until the end of --epochs 10; --epochs 5 lets it"),
        ({"lr_step": 9}, ""),
        ({"lr_schedule": "constant"}, ""),
        ({"lr": 0.0}, ""),
        (COSINE, ""),
        (COSINE | {"max_steps": 60}, ""),
        (COSINE | {"epochs": 1, "warmup": 0.8}, ""),
        (COSINE | BY_EPOCH | {"warmup": 4.5, "epochs": 6}, ""),
        (COSINE | {"lr_min": 0.6, "max_steps": 60}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_whose_rate_never_falls_says_so(changes: dict, said: str) -> None:
    optim = of(**changes)
    steps = min(optim.epochs * STEPS, optim.max_steps or math.inf)
    found = what_never_falls(optim, int(steps), STEPS)
    assert said in found and bool(said) == bool(found) and "\n" not in found


def test_a_rate_that_would_grow_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--lr-min 2 is above --lr 1, so the rate would grow"):
        of(**COSINE, lr_min=2.0)
    with pytest.raises(UsageError, match=r"^--peer-opt a-0: --lr-min 0.1 is above --lr 0.01"):
        of(**COSINE, lr_min=0.1, peer_opt=("a-0:lr=0.01",))
