"""Averages of weights: their decay, skipped steps, what they teach, where they are written."""

import copy
import dataclasses
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

from dml_accel import learn
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.data.sources import Source
from dml_accel.mutual import averages, reference
from dml_accel.mutual.averages import Average, average_decay, copy_of
from dml_accel.training import loop, setup
from tests.helpers import Training, assert_same_state, tiny_config
from tests.mutual.references import (
    assert_as_reference,
    link_rows,
    loss_options,
    nets_in_turn,
)

training_of_modules = sys.modules["dml_accel.training.learn"]  # its name is that of the function
Build = Callable[..., Training]
TWO, THREE = ("resnet8*2",), ("resnet8*3",)
FIRST_DECAYS = [1 / 10, 2 / 11, 3 / 12]  # (1 + t) / (10 + t)


def average_of(peer: object) -> nn.Module:
    average = peer.average  # type: ignore[attr-defined]
    assert average is not None
    return average.module


def test_the_decay_grows_to_the_highest_one() -> None:
    assert [average_decay(0.999, step) for step in range(3)] == FIRST_DECAYS
    assert average_decay(0.2, 1) == 2 / 11 and average_decay(0.2, 2) == 0.2
    assert average_decay(0.999, 8_990) == 8_991 / 9_000 == 0.999
    assert average_decay(0.999, 8_989) < 0.999 == average_decay(0.999, 10**6)


@pytest.mark.parametrize("changes", [{}, {"update": "sequential"}, {"update": "official"}], ids=str)
def test_an_average_is_that_of_timm(training: Build, changes: dict[str, object]) -> None:
    t = training(ema=0.2, **changes)
    theirs = [ModelEmaV3(peer.module) for peer in t.peers]
    for step, decay in enumerate([1 / 10, 2 / 11, 0.2]):
        t.take(1, start=step)
        for peer, average in zip(t.peers, theirs, strict=True):
            average.decay = decay
            average.update(peer.module)
            ours, right = average_of(peer).state_dict(), average.module.state_dict()
            for name, value in right.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)
    counts = {value.item() for name, value in ours.items() if name.endswith("batches_tracked")}
    assert counts == {6 if changes.get("update") == "official" else 3}


def test_training_does_not_depend_on_averages(training: Build) -> None:
    with_, without = training(ema=0.9), training()
    assert torch.equal(torch.stack(with_.take(3)), torch.stack(without.take(3)))
    for name, state in with_.states().items():
        own = {key: value for key, value in state.items() if not key.startswith("ema.")}
        assert_same_state(own, without.states()[name])
    assert all(peer.average is None for peer in without.peers)


def test_a_skipped_step_leaves_no_trace(training: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    t = training(ema=0.9)
    t.take(2)
    lost, other = t.peers
    before = copy.deepcopy(average_of(lost).state_dict())
    others = copy.deepcopy(average_of(other).state_dict())
    forward = lost.module.forward
    monkeypatch.setattr(lost.module, "forward", lambda x: forward(x) * math.nan)
    assert t.take(1, start=2)[0].isfinite().all(1).tolist() == [False, True]
    assert_same_state(average_of(lost).state_dict(), before)
    assert not torch.equal(average_of(other).state_dict()["fc.weight"], others["fc.weight"])


class Odd(nn.Module):
    """A network with a shared weight and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("mask", torch.tensor([-math.inf, 0.0]), persistent=False)
        self.register_buffer("level", torch.tensor([4.0]))


def test_shared_weights_move_once_and_constants_stay() -> None:
    net = Odd()
    average = Average(copy_of(net, "odd"), net, 0.2)
    start = net.a.weight.detach().clone()
    with torch.no_grad():
        net.a.weight += 1
    net.level = torch.tensor([8.0])  # replaced, not changed
    average.update(torch.tensor(True), 0)
    ours = average.module
    torch.testing.assert_close(ours.a.weight, start + 0.9)
    assert ours.b.weight is ours.a.weight
    assert torch.equal(ours.mask, net.mask) and ours.level.item() == pytest.approx(7.6)
    assert not any(weight.requires_grad for weight in ours.parameters())


def test_what_is_not_finite_stays_as_it_is() -> None:
    net = Odd()
    net.register_buffer("bounds", torch.tensor([-math.inf, 0.0, 0.0]))  # saved, so averaged
    net.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = Average(copy_of(net, "odd"), net, 0.2)
    ours, start = average.module, copy.deepcopy(average.module.state_dict())
    with torch.no_grad():
        net.bounds += torch.tensor([0.0, 1.0, math.nan])
        net.conv.weight += torch.arange(24.0).view(3, 2, 2, 2)
    average.update(torch.tensor(True), 0)
    torch.testing.assert_close(ours.bounds, torch.tensor([-math.inf, 0.9, 0.0]))
    torch.testing.assert_close(
        ours.conv.weight, start["conv.weight"] + 0.9 * torch.arange(24.0).view(3, 2, 2, 2)
    )
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        net.conv.weight.fill_(math.nan)
        net.a.weight += 1
    average.update(torch.tensor(False), 1)
    assert_same_state(ours.state_dict(), before)


@pytest.mark.parametrize("of_modules", [False, True])
def test_a_copy_is_tried_before_anything_is_built(
    digits: Source, monkeypatch: pytest.MonkeyPatch, of_modules: bool
) -> None:
    def refuse(module: nn.Module, name: str) -> nn.Module:
        raise UsageError(f"{name} cannot be copied")

    monkeypatch.setattr(averages, "copy_of", refuse)
    monkeypatch.setattr(training_of_modules, "make_cohort", None)
    data = torch.zeros(8, 2), torch.arange(8) % 2
    with pytest.raises(UsageError, match="a cannot be copied|resnet8-0 cannot be copied"):
        if of_modules:
            learn({"a": nn.Linear(2, 2)}, data, data, Config(ema=0.9, batch_size=4))
        else:
            setup.check(tiny_config(ema=0.9), digits)


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    net = nn.Linear(2, 2)
    net.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="^--ema and --exchange-every keep weights of mine in a"):
        copy_of(net, "mine")


@pytest.mark.parametrize(
    ("cohort", "changes"),
    [
        (TWO, {"low_memory": True, "grad_accum": 2}),
        (THREE, {"links": "ring", "target": "mean-logit", "temperature": 2.0}),
        (TWO, {"target": "mean-prob", "exchange": "sum"}),
    ],
    ids=str,
)
def test_averages_teach_as_the_reference_says(
    training: Build, cohort: tuple[str, ...], changes: dict[str, object]
) -> None:
    t = training(cohort=cohort, ema=0.9, teach_with="ema", **changes)
    nets = nets_in_turn(t)
    averages = [ModelEmaV3(net) for net in nets]
    optimizers = [
        torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for net in nets
    ]
    for number, decay in enumerate(FIRST_DECAYS):
        step = t.step(number, 0.05)
        rows = (step.rows(number, part) for part in step.micro_batches)
        batches = [(images, labels.classes) for images, labels in rows]
        expected = reference.step(
            nets,
            optimizers,
            batches,
            averages=[average.module for average in averages],
            links=link_rows(t),
            **loss_options(t.config),
        )
        for net, average in zip(nets, averages, strict=True):
            average.decay = decay
            average.update(net)
        (found,) = t.take(1, start=number)
        assert_as_reference(t, nets, found, expected)


def test_a_kl_weight_of_0_needs_no_averages(
    training: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = training(ema=0.9, teach_with="ema", kl_weight=0.0)
    monkeypatch.setattr(Average, "predict", None)
    t.take(1)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"teach_with": "ema"}, "--teach-with ema needs --ema"),
        ({"teach_with": "ema", "ema": 0.9, "update": "official"}, "--update simultaneous"),
        ({"teach_with": "ema", "ema": 0.9, "batch_norm": "local"}, "--batch-norm group"),
    ],
    ids=str,
)
def test_what_averages_cannot_teach_is_refused(flags: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Config(**flags)


def test_an_evaluation_measures_averages_as_networks_of_their_own(training: Build) -> None:
    t = training(images=80, ema=0.9, val_fraction=0.1)
    data = dataclasses.replace(t.data, test=t.data.val)  # which is small
    records = [
        record
        for record in loop.fit(t.cohort, data, t.config.run)
        if isinstance(record, loop.EvaluationRecord)
    ]
    found = records[-1].ema
    assert found is not None and found["test"] != records[-1].test
    assert found["test"] == found["val"]
    assert all(peer.module.training and not average_of(peer).training for peer in t.peers)
    for peer in t.peers:  # measured again, as the weights of the peers
        peer.module.load_state_dict(average_of(peer).state_dict())
    assert data.val is not None
    assert found["val"] == loop.evaluate(t.peers, data.val, 10, t.placement)


def test_averages_are_written_beside_the_weights(chosen: Path) -> None:
    for name in ("resnet8-0", "resnet8-1"):
        newest = max(chosen.glob("checkpoints/*"))
        saved = load_file(newest / f"{name}.safetensors")
        for folder, kind in (("peers", "model."), ("peers-averaged", "ema.")):
            written = load_file(chosen / folder / name / "model.safetensors")
            ours = {n.removeprefix(kind): t for n, t in saved.items() if n.startswith(kind)}
            assert_same_state(written, ours)
        card = (chosen / "peers-averaged" / name / "README.md").read_text()
        assert "exponential moving averages (decay 0.9)" in card
        assert "moving average" not in (chosen / "peers" / name / "README.md").read_text()
