"""The buffers of a network over a step: counted, kept and put back as one layer after the other."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dml_accel.mutual.buffers import Buffers
from tests.helpers import assert_same_state


class Net(nn.Module):
    """A layer that runs twice, one that never runs, and others that count in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.BatchNorm2d(3)
        self.never = nn.BatchNorm2d(3)
        self.act = BatchNormAct2d(3)
        self.cumulative = nn.BatchNorm2d(3, momentum=None)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.register_buffer("ticks", torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        x = self.untracked(self.cumulative(self.act(x)))
        self.ticks += 1
        return x


@pytest.fixture
def net() -> Net:
    return Net()


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("counts", [True, False])
def test_forward_passes_are_counted_as_the_layers_count(net: Net, counts: bool) -> None:
    native, buffers = copy.deepcopy(net), Buffers(net, counts=counts)
    for seed in range(3):
        expected = native(images(seed))
        with buffers.counting():
            found = net(images(seed))
        assert torch.equal(found, expected)
        assert_same_state(state(net), state(native))
    assert (net.twice.num_batches_tracked, net.never.num_batches_tracked) == (6, 0)


def test_a_forward_pass_that_fails_leaves_the_counters(net: Net) -> None:
    with pytest.raises(ValueError, match="4D"), Buffers(net, counts=True).counting():
        net(torch.zeros(2))
    assert net.twice.num_batches_tracked == 0


@pytest.mark.parametrize("moved", [False, True])
def test_a_skipped_step_leaves_the_buffers_as_they_were(net: Net, moved: bool) -> None:
    buffers = Buffers(net, counts=True)
    buffers.begin_step()
    if moved:  # the buffers are other tensors from then on
        net.double()
    for finite in (True, False, True):
        before = state(net)
        buffers.begin_step()
        with buffers.counting():
            net(images(0).to(net.twice.weight.dtype))
        after = state(net)
        assert not torch.equal(after["twice.running_mean"], before["twice.running_mean"])
        assert not torch.equal(after["ticks"], before["ticks"])
        buffers.end_step(torch.tensor(finite))
        assert_same_state(state(net), after if finite else before)


def test_a_step_that_is_skipped_forgets_numbers_that_are_not_finite(net: Net) -> None:
    buffers, before = Buffers(net, counts=True), state(net)
    buffers.begin_step()
    net(images(0) * torch.nan)
    buffers.end_step(torch.tensor(False))
    assert_same_state(state(net), before)


@pytest.mark.parametrize("in_step", [True, False])
def test_a_look_leaves_no_trace(net: Net, in_step: bool) -> None:
    buffers, before = Buffers(net, counts=True), state(net)
    if in_step:
        buffers.begin_step()
    with buffers.keeping(), buffers.counting():
        net(images(0))
    assert_same_state(state(net), before)


def test_a_network_in_training_can_be_saved_and_copied(net: Net, tmp_path: Path) -> None:
    # safetensors refuses tensors that share memory.
    Buffers(net, counts=True).begin_step()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    assert_same_state(state(copy.deepcopy(net)), state(net))
