"""Recipes: what each sets, its rates worked out by hand, what overrides it; each takes 20 steps."""

import re
from math import sqrt
from typing import Any

import pytest

from dml_accel.analysis.methods import PRESETS
from dml_accel.cli.parser import parse
from dml_accel.core import recipes
from dml_accel.core.assignments import peer_settings
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.settings import settle
from dml_accel.data.sources import Source
from dml_accel.models.schedules import learning_rate
from dml_accel.training.loop import StepRecord, fit
from tests.helpers import ROOT, Training, tiny_config

PAPERS = {
    "paper": {"epochs": 200, "batch_size": 64, "lr": 0.1, "lr_step": 60, "lr_gamma": 0.1},
    "one": {"epochs": 300, "batch_size": 128, "lr": 0.1, "lr_milestones": (150, 225)},
    "mcl": {"epochs": 300, "batch_size": 128, "lr": 0.1, "lr_schedule": "cosine"},
    "crd": {"epochs": 240, "batch_size": 64, "lr": 0.05, "lr_milestones": (150, 180, 210)},
    "renyi": {"epochs": 200, "batch_size": 128, "lr": 0.1, "lr_step": 60, "lr_gamma": 0.2},
    "imagenet": {"epochs": 100, "batch_size": 128, "lr": 0.4, "warmup": 5, "weight_decay": 4e-5},
    "modern": {"optimizer": "adamw", "lr": 1e-3, "warmup": 5, "weight_decay": 0.05, "mixup": 0.2},
}
SAME = {"okddip": "one", "dkd": "crd", "logit-standardisation": "crd"}
# Rates at five places, each {epoch: rate}, with four steps to an epoch.
HALF = sqrt(0.5)
RATES = {
    "paper": {0: 0.1, 59.75: 0.1, 60: 0.01, 120: 0.001, 199.75: 0.0001},
    "one": {0: 0.1, 149.75: 0.1, 150: 0.01, 225: 0.001, 299.75: 0.001},
    # By epochs: 75 of 300 are an eighth of a turn; the last epoch has a three-hundredth left.
    "mcl": {0: 0.1, 75.75: 0.05 * (1 + HALF), 150: 0.05, 225: 0.05 * (1 - HALF), 299: 2.741532e-6},
    "crd": {0: 0.05, 149.75: 0.05, 150: 0.005, 180: 0.0005, 239.75: 0.00005},
    "renyi": {0: 0.1, 60: 0.02, 120: 0.004, 180: 0.0008, 199.75: 0.0008},
    # The warm-up has 20 steps; half of the 95 epochs after it are over at 52.5.
    "imagenet": {0: 0.02, 2.25: 0.2, 5: 0.4, 52.5: 0.2, 76.25: 0.2 * (1 - HALF)},
    "modern": {0: 0.00005, 2.25: 0.0005, 5: 0.001, 102.5: 0.0005, 151.25: 0.0005 * (1 - HALF)},
}


def config_of(name: str, **given: Any) -> Config:
    return settle(given, name).config


def test_every_recipe_is_tested() -> None:
    assert set(recipes.RECIPES) == {*PAPERS, *SAME}
    for name, other in SAME.items():
        assert recipes.flags_of(name, {}) == recipes.flags_of(other, {})


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_sets_what_its_source_says(name: str) -> None:
    found = config_of(name).as_dict()
    for flag, value in PAPERS[name].items():
        assert found[flag] == (list(value) if isinstance(value, tuple) else value), flag
    if name != "modern":
        nesterov = name not in ("crd", "imagenet")
        assert found["optimizer"] == ("sgd" if nesterov else "momentum")
        assert (found["momentum"], found["mixup"], found["ema"]) == (0.9, 0, None)


@pytest.mark.parametrize("name", RATES)
def test_the_rates_of_a_recipe_are_those_worked_out_by_hand(name: str) -> None:
    optim = config_of(name).optim
    for epoch, rate in RATES[name].items():
        assert learning_rate(optim, int(4 * epoch), 4) == pytest.approx(rate, rel=1e-6), epoch


def test_crd_trains_small_networks_at_their_own_rate() -> None:
    cohort = ("mobilenet*2", "resnet32", "timm:mobilenetv2_100", "timm:mobile_net[a=1]")
    optim = config_of("crd", cohort=cohort).optim
    names = ["mobilenet-0", "mobilenet-1", "mobilenetv2_100-0", "mobile_net-0"]
    assert optim.peer_opt == tuple(f"{name}:lr=0.01" for name in names)
    own = optim.of_peer("mobilenet-1")
    assert learning_rate(own, 0, 4) == 0.01
    assert learning_rate(own, 600, 4) == pytest.approx(0.001)
    assert optim.of_peer("resnet32-0").lr == 0.05
    # A rate that is given is meant for all.
    assert config_of("crd", cohort=cohort, lr=0.2).optim.of_peer("mobilenet-1").lr == 0.2


MOBILE = ("mobilenet*2", "resnet32")
BESIDE: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "another setting of one": (
        {"peer_opt": ["mobilenet-0:weight_decay=1e-4"]},
        {"mobilenet-0": {"lr": 0.01, "weight_decay": 1e-4}, "mobilenet-1": {"lr": 0.01}},
    ),
    "the same setting of one": (
        {"peer_opt": ["mobilenet-0:lr=0.02"]},
        {"mobilenet-0": {"lr": 0.02}, "mobilenet-1": {"lr": 0.01}},
    ),
    "a setting of another": (
        {"peer_opt": ["resnet32-0:lr=0.2,weight-decay=0"]},
        {"mobilenet-0": {"lr": 0.01}, "resnet32-0": {"lr": 0.2, "weight_decay": 0}},
    ),
    # A rate for SGD is none for AdamW.
    "another optimizer for one": (
        {"peer_opt": ["mobilenet-0:optimizer=adamw"]},
        {"mobilenet-0": {"lr": 1e-3, "optimizer": "adamw"}, "mobilenet-1": {"lr": 0.01}},
    ),
    "another of the family for one": (
        {"peer_opt": ["resnet32-0:optimizer=nesterov"]},
        {"resnet32-0": {"lr": 0.05, "optimizer": "nesterov"}, "mobilenet-1": {"lr": 0.01}},
    ),
    "none": ({"peer_opt": []}, {"mobilenet-0": {"lr": 0.05}, "mobilenet-1": {"lr": 0.05}}),
    "another of the family": (
        {"optimizer": "nesterov"},
        {"mobilenet-0": {"lr": 0.01, "optimizer": "nesterov"}, "resnet32-0": {"lr": 0.05}},
    ),
    "another family": (
        {"optimizer": "adamw"},
        {"mobilenet-0": {"lr": 1e-3}, "resnet32-0": {"lr": 1e-3, "weight_decay": 5e-4}},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_peers_have_beside_a_recipe(case: str) -> None:
    given, expected = BESIDE[case]
    optim = config_of("crd", cohort=MOBILE, **given).optim
    for peer, settings in expected.items():
        own = optim.of_peer(peer)
        assert {name: getattr(own, name) for name in settings} == settings, peer
    of_peers = [peer_settings(text) for text in optim.peer_opt]
    keys = [(peer, key) for peer, settings in of_peers for key in settings]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("other", ["nesterov", "momentum"])
def test_an_optimizer_of_the_family_keeps_what_a_recipe_sets(other: str) -> None:
    found, recipe = (config_of("renyi", **one).as_dict() for one in ({"optimizer": other}, {}))
    assert found == recipe | {"optimizer": other}


def test_a_recipe_overrides_a_preset() -> None:
    laptop = PRESETS["laptop"].changes
    optim = settle({}, "one", base=laptop).config.optim
    assert (optim.epochs, optim.lr_milestones, optim.batch_size) == (300, (150, 225), 128)
    found = settle({"epochs": 40}, "modern", base=laptop).config  # what modern does not set stays
    assert (found.optim.epochs, found.data.train_limit, found.optim.lr) == (40, 10_000, 1e-3)
    assert settle({}, "modern", base=laptop).config.optim.epochs == 20


OVERRIDES: dict[str, dict[str, Any]] = {
    "another schedule": {"lr_schedule": "cosine"},
    "the usual schedule": {"lr_schedule": "step"},
    "another optimizer": {"optimizer": "adamw"},
    "fewer epochs": {"epochs": 10},
    "another rate": {"lr": 0.3},
    "no averages": {"wd_exclude_norm_bias": False, "mixup": 0.0},
}


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_any_flag_overrides_a_recipe(name: str, override: str) -> None:
    given = OVERRIDES[override]
    found, recipe = config_of(name, **given).as_dict(), config_of(name).as_dict()
    for flag, value in given.items():
        assert found[flag] == value
    usual = Config(**{n: v for n, v in given.items() if n in ("optimizer",)}).as_dict()
    gone = {other for flag in given for other in recipes._GO_WITH.get(flag, ())}
    if all(recipe[flag] == value for flag, value in given.items()):
        gone = set()
    for flag in found.keys() - given.keys():
        assert found[flag] == (usual if flag in gone else recipe)[flag], flag


def test_what_a_recipe_needs_is_said_to_be_its() -> None:
    message = r"--warmup 5 is not below --epochs 3.*\(--warmup and --lr from --recipe modern\)"
    with pytest.raises(UsageError, match=message):
        config_of("modern", epochs=3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cdr", "did you mean crd?"),
        ("qqq", "there are paper, one, okddip, mcl"),
        ("", "there are paper"),
    ],
)
def test_an_unknown_recipe_is_refused(name: str, hint: str) -> None:
    with pytest.raises(
        UsageError, match=f"--recipe {name or repr('')} is unknown: {hint}".replace("?", r"\?")
    ):
        config_of(name)


def test_the_list_shows_what_each_recipe_sets() -> None:
    text = recipes.listed({"cohort": ("mobilenet", "resnet32")})
    assert [line for line in text.splitlines() if line[0] != " "] == list(recipes.RECIPES)
    said = " ".join(text.split())
    assert "--lr-milestones 150 180 210 --lr-gamma 0.1" in said
    assert "--peer-opt mobilenet-0:lr=0.01 dkd" in said
    assert "--wd-exclude-norm-bias --ema 0.999" in said
    assert max(map(len, text.splitlines())) <= 100


def test_the_documentation_describes_every_recipe() -> None:
    rows = [
        line for line in (ROOT / "docs/training.md").read_text().splitlines() if line[:3] == "| `"
    ]
    for name in recipes.RECIPES:
        assert any(f"`{name}`" in row.split("|")[1] for row in rows), name


def test_the_demo_ends_at_a_lower_rate() -> None:
    (words,) = re.findall(r'^DEMO = "(.*)"', (ROOT / "launch/start.py").read_text(), re.M)
    given = parse(["train", *words.split()])
    given.pop("subcommand")
    optim, epoch = settle(given).config.optim, 1437 // 16
    rates = [learning_rate(optim, step, epoch) for step in range(optim.epochs * epoch)]
    assert rates[0] == 0.05 and max(rates[-epoch:]) <= 0.005 + 1e-12


@pytest.mark.parametrize("name", PAPERS)
def test_every_recipe_takes_twenty_steps(name: str, digits: Source) -> None:
    flags = recipes.flags_of(name, {"image_size": 16, "batch_size": 4, "dataset": "digits"})
    training = Training(tiny_config(**flags, batch_size=4, float64=False, max_steps=20), digits)
    records = list(fit(training.cohort, training.data, training.config.run))
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [record.step for record in steps] == list(range(1, 21))
    assert all(record.losses_KP.isfinite().all() for record in steps)
    for peer in training.peers:  # the rate of the last step
        optim = training.config.optim.of_peer(peer.name)
        assert peer.optimizer.param_groups[0]["lr"] == learning_rate(optim, 19, 1437 // 4)
