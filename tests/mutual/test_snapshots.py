"""Weights of the last exchange teach: --exchange-every and --burn-in, step by step."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dml_accel import learn
from dml_accel.core.errors import UsageError
from dml_accel.data.sources import Source
from dml_accel.models.optim import make_optimizer
from dml_accel.mutual import reference
from dml_accel.mutual.snapshots import Snapshots
from dml_accel.training import setup
from tests.helpers import assert_same_state, tiny_config
from tests.mutual.references import (
    Build,
    assert_as_reference,
    batch_of,
    link_rows,
    loss_options,
    nets_in_turn,
)

THREE = ("resnet8*3",)
STALE: dict[str, Any] = {"cohort": THREE, "exchange_every": 3, "burn_in": 2, "max_steps": 9}


def losses_of(found: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"low_memory": True, "grad_accum": 2, "target": "mean-logit-all", "temperature": 2.0},
        {"links": "ring", "divergence": "renyi"},
        {"exchange_every": 1, "update": "sequential", "max_steps": 4},
    ],
    ids=str,
)
def test_steps_are_those_of_peers_taught_by_copies(
    training: Build, changes: dict[str, Any]
) -> None:
    t = training(**STALE | changes)
    every, nets = t.config.method.exchange_every, nets_in_turn(t)
    optimizers = [make_optimizer(net, t.config.optim) for net in nets]
    options, taught = loss_options(t.config) | {"links": link_rows(t)}, []
    for step in range(4 if every == 1 else 7):
        if step in (2, 5):  # the first exchange, and the next
            taught = [copy.deepcopy(net).eval() for net in nets]
        options["kl_weight"] = 0.0 if step < 2 else 1.0
        half = 8 // t.config.optim.grad_accum
        batches = [batch_of(t, step, lo, lo + half) for lo in range(0, 8, half)]
        if every == 1:
            expected = reference.sequential_step(nets, optimizers, batches[0], **options)
        else:
            expected = reference.step(nets, optimizers, batches, averages=taught, **options)
        (found,) = t.take(1, start=step)
        assert (found[:, 2] == 0).all() == (step < 2)
        assert_as_reference(t, nets, found, expected)
        by_name = dict(zip(t.cohort.teaching.turns, nets, strict=True))
        for peer in t.peers:
            for name, value in by_name[peer.name].state_dict().items():
                torch.testing.assert_close(
                    peer.module.state_dict()[name], value, rtol=1e-12, atol=1e-12
                )


def test_before_the_burn_in_ends_peers_train_alone_bit_for_bit(training: Build) -> None:
    for changes in ({}, {"exchange_every": 1}, {"exchange_every": 1, "update": "sequential"}):
        late, alone = training(**STALE | changes), training(cohort=THREE, kl_weight=0.0)
        assert torch.equal(losses_of(late.take(2)), losses_of(alone.take(2)))
        assert all(peer.snapshot is None or not peer.snapshot.is_taken for peer in late.peers)
        for name, state in alone.states().items():
            assert_same_state(late.states()[name], state)
        assert (late.take(1, start=2)[0][:, 2] > 0).all()


def test_the_weight_grows_from_the_end_of_the_burn_in_on(training: Build) -> None:
    # 5 steps an epoch: the weight of the third step is 1/5.
    t = training(images=40, kl_warmup=1, burn_in=2)
    assert [t.cohort.teaching.kl_weight(step, 5) for step in (2, 3, 6, 9)] == [0.2, 0.4, 1.0, 1.0]


def test_a_network_that_stands_alone_learns_from_the_others_as_among_them(
    training: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = training(**STALE | {"burn_in": 0})
    t.take(1)
    snapshots, asked = t.cohort.snapshots, []
    assert isinstance(snapshots, Snapshots)
    for name, snapshot in snapshots.of.items():
        snapshot.module.register_forward_hook(lambda *_, name=name: asked.append(name))
    x = t.data.train.batch(1, 8, 0, 8)[0]
    logits = snapshots.predict(x)
    assert asked == list(snapshots.of) == t.placement.names
    monkeypatch.setattr(snapshots, "_unused", "resnet8-1")
    some = snapshots.predict(x)
    assert asked[3:] == ["resnet8-0", "resnet8-2"]
    assert torch.equal(some[[0, 2]], logits[[0, 2]]) and not some[1].any()
    labels = t.data.train.batch(1, 8, 0, 8)[1]
    teaching = t.cohort.teaching
    whole, one = (teaching.targets(z, labels, 8, t.placement).of(1) for z in (logits, some))
    torch.testing.assert_close(one.taught, whole.taught, rtol=1e-12, atol=1e-14)
    assert torch.equal(one.teachers, whole.teachers)


def test_no_gradient_and_no_step_reaches_what_teaches(training: Build) -> None:
    t = training(**STALE | {"burn_in": 0})
    t.take(1)
    kept = [copy.deepcopy(peer.snapshot.module.state_dict()) for peer in t.peers if peer.snapshot]
    t.take(2, start=1)
    for peer, before in zip(t.peers, kept, strict=True):
        assert peer.snapshot is not None and not peer.snapshot.module.training
        weights = [*peer.snapshot.module.parameters()]
        assert all(weight.grad is None and not weight.requires_grad for weight in weights)
        assert_same_state(peer.snapshot.module.state_dict(), before)
        assert not torch.equal(peer.module.fc.weight, before["fc.weight"])


def test_what_teaches_never_waits_for_a_kl_term(training: Build) -> None:
    assert training(exchange_every=3, kl_weight=0.0).cohort.snapshots is None
    assert training().cohort.snapshots is None


class Odd(nn.Module):
    """A network with a weight in two places, a constant, and a buffer that it replaces."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        nn.init.constant_(self.a.weight, value)
        self.register_buffer("seen", torch.tensor(int(value)))
        self.register_buffer("mask", torch.tensor([-torch.inf, 0.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_shared_weights_and_buffers_are_those_of_the_exchange(training: Build) -> None:
    t = training()
    network = Odd(1)
    snapshot = Snapshots(
        dict.fromkeys(t.placement.names, Odd(0)),
        {"resnet8-0": network},
        t.placement,
        training(exchange_every=2).config.method,
    )
    with torch.no_grad():
        network.a.weight += 1
    network.seen = torch.tensor(7)  # replaced, not changed
    snapshot.begin_step(1)  # nothing is due
    ours = snapshot.of["resnet8-0"].module
    assert (ours.a.weight == 0).all()
    snapshot.begin_step(2)
    assert (ours.a.weight == 2).all() and ours.b.weight is ours.a.weight
    assert ours.seen == 7 and torch.equal(ours.mask, network.mask)


def test_what_would_never_begin_or_has_nobody_to_learn_from_is_refused(digits: Source) -> None:
    images = len(digits.train)
    steps = 2 * (images // 8)
    long = {"epochs": 2, "max_steps": None}
    setup.check(tiny_config(burn_in=steps - 1, **long), digits)
    said = f"--burn-in {steps} is not below the {steps} steps of the run, so the KL term would"
    with pytest.raises(UsageError, match=said):
        setup.check(tiny_config(burn_in=steps, **long), digits)
    setup.check(tiny_config(burn_in=steps // 2, kl_warmup=1, **long), digits)
    with pytest.raises(UsageError, match=f"--burn-in {steps // 2 + 1} and --kl-warmup 1 are more"):
        setup.check(tiny_config(burn_in=steps // 2 + 1, kl_warmup=1, **long), digits)
    with pytest.raises(UsageError, match="--exchange-every 3 is about what peers teach each other"):
        setup.check(tiny_config(cohort=("resnet8",), exchange_every=3), digits)


def test_networks_of_the_callers_learn_from_the_last_exchange() -> None:
    images = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    flags = {"batch_size": 4, "lr": 0.1, "epochs": 1, "cpu": True, "exchange_every": 3}

    class Late(nn.Linear):
        """A network that has a buffer from its first forward pass in training on."""

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("mean", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.mean = x.mean(0).detach()
            return super().forward(x)

    def losses(**changes: Any) -> torch.Tensor:
        torch.manual_seed(0)
        nets = {name: Late() for name in ("a", "b")}
        records = list(learn(nets, images, images, **flags | changes))
        return torch.stack([record.losses_KP for record in records[:4]])  # type: ignore[union-attr]

    stale, fresh = losses(), losses(exchange_every=1)
    assert torch.equal(stale[0], fresh[0]) and not torch.equal(stale[1:3], fresh[1:3])
    with pytest.raises(UsageError, match="--burn-in 4 is not below the 4 steps of the run"):
        losses(burn_in=4)
