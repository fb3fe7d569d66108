"""Optimizers: each of timm's is skipped without a trace and resumed bit for bit, or refused."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from safetensors.torch import load, save
from torch import nn

from dml_accel.core.config import Config, OptimConfig
from dml_accel.core.errors import UsageError
from dml_accel.models.optim import check_optimizers, make_optimizer, refusal, state_per_parameter
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.peer import Peer
from dml_accel.training import checkpoint
from dml_accel.training.optimizer_state import pack_state, problem, unpack_state

NAMES = timm.optim.list_optimizers()
REFUSED = [name for name in NAMES if refusal(name)]
TRAINED = [name for name in NAMES if name not in REFUSED]
FLOAT64 = {"dtype": torch.float64, "memory_format": torch.channels_last}


def peer(optim: OptimConfig, scaler: bool = False, **to: Any) -> Peer:
    torch.manual_seed(1)
    # The linear layer is large enough for second moments that are factored.
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32)
    ).to(**to)
    scaling = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=8.0)
    return Peer(PeerSpec("a-0", "none"), net, net, make_optimizer(net, optim), scaling)


def take(one: Peer, step: int, spoil: float = 1.0, lr: float = 0.01) -> bool:
    """Take a step on images multiplied by ``spoil``; return whether the peer has."""
    weight = one.module[0].weight
    draws = torch.Generator().manual_seed(step)
    x = spoil * torch.randn(6, 3, 4, 4, generator=draws).to(weight)
    y = torch.randint(32, (6,), generator=draws)
    one.begin_step(lr)
    loss = nn.functional.cross_entropy(one.forward(x, step), y)
    one.scaler.scale(loss).backward()
    return bool(one.update(loss.detach().isfinite(), None))


def state(one: Peer) -> tuple[dict[str, torch.Tensor], Any]:
    """What a checkpoint holds of a peer; the rest is read back from its format."""
    tensors, rest = checkpoint.pack(one)
    return tensors, json.loads(json.dumps(rest, allow_nan=False))


def assert_equal(one: Any, other: Any) -> None:
    (tensors, rest), (others, other_rest) = one, other
    assert rest == other_rest
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


# ---------------------------------------------------------------- every name of timm's


def test_every_name_is_trained_with_or_refused_with_the_reason() -> None:
    for name in TRAINED:
        check_optimizers(Config(optimizer=name).optim, [])
    for name in [*REFUSED, "lookahead_adamw"]:
        with pytest.raises(UsageError, match=f"--optimizer {name} is not supported: it|its slow"):
            check_optimizers(Config(optimizer=name).optim, [])
    # A refusal is an exception: these are what people train with.
    assert {"sgd", "adam", "adamw", "lamb", "lion", "muon", "rmsprop", "adafactor"} <= {*TRAINED}


@pytest.mark.parametrize("to", [{}, FLOAT64], ids=["float32", "float64 channels_last"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_optimizer_skips_without_a_trace_and_resumes_bit_for_bit(name: str, to: Any) -> None:
    optim = Config(optimizer=name, lr=0.01, wd_exclude_norm_bias="dtype" in to).optim
    straight, stopped, fresh = (peer(optim, **to) for _ in range(3))
    start = state(straight)
    assert not take(straight, 9, spoil=torch.nan)
    assert_equal(state(straight), start)
    for step in range(3):
        assert take(straight, step) and take(stopped, step)
    tensors, rest = state(stopped)
    saved = load(save(tensors)), rest  # read back from the other format
    assert not torch.equal(saved[0]["model.0.weight"], start[0]["model.0.weight"])
    assert not take(straight, 9, spoil=torch.nan)
    assert_equal(state(straight), saved)
    take(fresh, 7)  # another history, all of which must be replaced
    assert not problem(fresh.optimizer, checkpoint.weights_in(saved[0], "optimizer"), saved[1])
    checkpoint.unpack(fresh, *saved)
    assert_equal(state(fresh), saved)
    for step in (3, 4):
        take(straight, step), take(fresh, step)
    assert_equal(state(fresh), state(straight))


# ---------------------------------------------------------------- what is made


def test_sgd_is_the_one_of_torch() -> None:
    net, optim = nn.Linear(2, 2), Config(lr=0.2, momentum=0.8, weight_decay=0.1).optim
    settings = {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "fused": True}
    for changes in ({}, {"momentum": 0.0, "nesterov": False}):
        own = dataclasses.replace(optim, momentum=(settings | changes)["momentum"])
        found, torchs = (
            make_optimizer(net, own),
            torch.optim.SGD(net.parameters(), **settings | changes),
        )
        assert type(found) is torch.optim.SGD
        assert found.param_groups == torchs.param_groups and found.defaults == torchs.defaults
    assert not make_optimizer(net, dataclasses.replace(optim, optimizer="momentum")).defaults[
        "nesterov"
    ]


def test_arguments_reach_the_optimizer() -> None:
    given = ("betas=0.8,0.95", "eps=1e-6", "amsgrad=true")
    group = peer(Config(optimizer="adamw", opt_args=given).optim).optimizer.param_groups[0]
    found = [group[name] for name in ("betas", "eps", "amsgrad", "fused")]
    assert found == [(0.8, 0.95), 1e-6, True, True]
    lars = peer(Config(optimizer="lars", momentum=0.7, opt_args=("trust_coeff=0.01",)).optim)
    assert [lars.optimizer.defaults[name] for name in ("momentum", "trust_coeff")] == [0.7, 0.01]


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, 1.0),
        ({"momentum": 0.0}, 0.0),
        ({"optimizer": "adamw"}, 2.0),
        ({"optimizer": "adamw", "opt_args": ("amsgrad=true",)}, 3.0),
        ({"optimizer": "adan"}, 4.0),
        # A row, a column, and the whole of the bias, of 32 x 32 + 32 parameters.
        ({"optimizer": "adafactor"}, 3 * 32 / (33 * 32)),
    ],
    ids=str,
)
def test_what_an_optimizer_keeps_is_counted(changes: dict, numbers: float) -> None:
    state_of_torch = torch.get_rng_state()
    assert state_per_parameter(Config(**changes).optim) == numbers
    assert torch.equal(torch.get_rng_state(), state_of_torch)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_norms_and_biases_need_not_decay(optimizer: str) -> None:
    one = peer(Config(optimizer=optimizer, wd_exclude_norm_bias=True).optim)
    decays = {p: g["weight_decay"] for g in one.optimizer.param_groups for p in g["params"]}
    found = {name: decays[p] for name, p in one.module.named_parameters()}
    weights = {"0.weight", "4.weight"}  # of the convolution and the linear layer
    assert found == {name: 5e-4 if name in weights else 0.0 for name in found}
    (group,) = peer(Config(optimizer=optimizer).optim).optimizer.param_groups
    assert group["weight_decay"] == 5e-4 and len(group["params"]) == 6


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion"])
def test_a_step_whose_gradients_overflow_is_not_taken(optimizer: str) -> None:
    # As in fp16: the loss is finite, the gradients are not.
    one = peer(Config(optimizer=optimizer).optim, scaler=True)
    assert take(one, 0)
    before = state(one)[0]
    spoiling = one.module[0].bias.register_hook(lambda gradient: gradient * torch.inf)
    assert not take(one, 1)
    spoiling.remove()
    after = state(one)[0]
    for name in before.keys() - {"model.1.running_mean", "model.1.running_var"}:
        assert name.endswith("tracked") or torch.equal(before[name], after[name]), name
    assert not take(one, 2, spoil=torch.nan)
    assert take(one, 3)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "adamv"}, "--optimizer adamv: there is no such optimizer; near are adam, "),
        ({"optimizer": "AdamW"}, "--optimizer AdamW: there is no such optimizer; near are adamw"),
        ({"optimizer": "zzzz"}, "--optimizer zzzz: there is no such optimizer; timm has "),
        ({"opt_args": ("betas=0.9,0.99",)}, "--optimizer sgd does not take betas; it takes nest"),
        ({"opt_args": ("momentum=0.5",)}, "--opt-args momentum=0.5: use --momentum"),
        (
            {"optimizer": "lion", "opt_args": ("eps=1e-6",)},
            "--optimizer lion does not take eps; it takes betas, caution",
        ),
        (
            {"optimizer": "adamw", "opt_args": ("amsgrad=maybe",)},
            "--optimizer adamw: amsgrad is maybe; it must be True or False",
        ),
        (
            {"optimizer": "adamw", "opt_args": ("betas=0.9,1.5",)},
            "--optimizer adamw cannot work with its arguments: Invalid beta parameter at index 1",
        ),
        (
            {"optimizer": "adamw", "opt_args": ("eps=small",)},
            "--optimizer adamw cannot work with its arguments: ",
        ),
        (
            {"optimizer": "adamw", "opt_args": ("betas=0.9,0.95,.99",)},
            "--optimizer adamw: betas is (0.9, 0.95, 0.99); it must be 2 numbers, as 0.9,0.999",
        ),
        (
            {"optimizer": "adan", "opt_args": ("betas=[0.9,0.95]",)},
            "--optimizer adan: betas is [0.9, 0.95]; it must be 3 numbers, as 0.98,0.92,0.99",
        ),
        (
            {"optimizer": "adamw", "opt_args": ("betas=0.9",)},
            "--optimizer adamw: betas is 0.9; it must be 2 numbers, as 0.9,0.999",
        ),
        (
            {"optimizer": "adamw", "opt_args": ("eps=1e999",)},
            "--optimizer adamw: eps is inf; it must be finite",
        ),
        (
            {"optimizer": "muon", "opt_args": ("ns_coefficients=3,-1e999,2",)},
            "--optimizer muon: ns_coefficients is (3, -inf, 2); it must be finite",
        ),
        ({"peer_opt": ("b-1:lr=1",)}, "--peer-opt b-1: there is no such peer; there are b-0, a-0"),
        (
            {"peer_opt": ("b-0:optimizer=kron",)},
            "--peer-opt b-0: optimizer kron is not supported: it draws random numbers",
        ),
        (
            {"peer_opt": ("a-0:epochs=3",)},
            "--peer-opt a-0: optimizer sgd does not take epochs; it takes lr, mo",
        ),
    ],
    ids=str,
)
def test_what_an_optimizer_cannot_do_is_refused(changes: dict, said: str) -> None:
    state_of_torch = torch.get_rng_state()
    with pytest.raises(UsageError) as refused:
        check_optimizers(Config(**changes).optim, ["a-0", "b-0"])
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    assert torch.equal(torch.get_rng_state(), state_of_torch)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a-0:lr=1,lr=2", "--peer-opt a-0: gives lr twice"),
        ("a-0:lr=fast", "--peer-opt a-0: lr is 'fast'; it must be a number"),
        ("a-0:lr=-1", "--peer-opt a-0: --lr is -1.0; it must be at least 0"),
        ("a-0:momentum=1", "--peer-opt a-0: --momentum is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_bad_settings_of_a_peer_are_refused(given: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Config(peer_opt=(given,))
    assert str(refused.value).startswith(said)


FOREIGN: dict[str, Callable[[dict, dict], object]] = {
    "another shape": lambda t, _: t.update({"4.exp_avg_sq_row": torch.zeros(31)}),
    "another dtype": lambda t, _: t.update({"0.exp_avg_sq": t["0.exp_avg_sq"].double()}),
    "missing": lambda t, _: t.pop("4.exp_avg_sq_col"),
    "of no weight": lambda t, _: t.update({"77.exp_avg_sq": torch.zeros(1)}),
    "of no name": lambda t, _: t.update({"x": torch.zeros(1)}),
    "no number": lambda _, rest: rest["optimizer"].update({"0.step": "3"}),
    "a truth, no number": lambda _, rest: rest["optimizer"].update({"0.step": True}),
    "a number too many": lambda _, rest: rest["optimizer"].update({"0.steps": 3}),
    "no numbers": lambda _, rest: rest.update({"optimizer": [1]}),
    "no groups": lambda _, rest: rest.pop("groups"),
    "a group too many": lambda _, rest: rest["groups"].append({}),
    "other weights": lambda _, rest: rest["groups"][0].update({"params": [1]}),
    "no weights": lambda _, rest: rest["groups"][0].pop("params"),
}


def test_settings_of_another_version_are_those_of_this_one() -> None:
    one, fresh = (peer(Config(optimizer="adamw").optim) for _ in range(2))
    take(one, 0)
    tensors, rest = pack_state(one.optimizer)
    usual = dict(fresh.optimizer.param_groups[0])
    del rest["groups"][0]["fused"]  # as if an older version did not have it,
    rest["groups"][0] |= {"colour": 1, "eps": 7.0}  # and had another one
    assert problem(fresh.optimizer, tensors, rest) == ""
    unpack_state(fresh.optimizer, tensors, rest)
    assert fresh.optimizer.param_groups[0] == usual
    assert_equal((pack_state(fresh.optimizer)[0], {}), (tensors, {}))


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_state_that_does_not_fit_is_refused(change: Callable[[dict, dict], object]) -> None:
    one = peer(Config(optimizer="adafactor").optim)
    take(one, 0)
    tensors, rest = pack_state(one.optimizer)
    # Small weights have whole second moments, large ones a row and a column.
    assert tensors["4.exp_avg_sq_row"].shape != (32, 64) and rest["optimizer"]["0.step"] == 1
    assert problem(one.optimizer, tensors, rest) == ""
    assert problem(peer(Config(optimizer="adamw").optim).optimizer, tensors, rest)
    change(tensors, rest)
    assert problem(one.optimizer, tensors, rest)
