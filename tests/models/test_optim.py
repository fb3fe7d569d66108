"""Optimizers: each of timm's is skipped without a trace and resumed bit for bit, or refused."""

import json
from typing import Any

import pytest
import timm.optim
import torch
from safetensors.torch import load, save
from torch import nn

from dml_accel.core.config import Config, OptimConfig
from dml_accel.core.errors import UsageError
from dml_accel.models.optim import check_optimizers, has_fused, make_optimizer, refusal
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.peer import Peer
from dml_accel.training import checkpoint
from dml_accel.training.optimizer_state import problem

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
    """What a checkpoint holds of a peer, read back from its two formats."""
    tensors, rest = checkpoint.pack(one)
    return load(save(tensors)), json.loads(json.dumps(rest, allow_nan=False))


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
    saved = state(stopped)
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
