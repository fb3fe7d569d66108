"""Batch norm over processes: what is converted, what is refused; test_processes has the values.

And its exactness in channels last, for a process by itself.
"""

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.data.sources import Source
from dml_accel.distributed import batchnorm
from dml_accel.distributed.batchnorm import (
    GroupBatchNorm2d,
    GroupBatchNormAct2d,
    check_spanning,
    span_group,
)
from dml_accel.distributed.compile import adds_up_in_pairs
from dml_accel.training import setup
from dml_accel.training.learn import learn
from tests.helpers import Training, tiny_config


def test_every_batch_norm_is_converted_with_weights_and_names_kept() -> None:
    net = timm.create_model("wrn_16_2_cifar", num_classes=10)
    before = net.state_dict()
    kinds = [type(layer) for layer in net.modules()]
    check_spanning(net, "wrn_16_2-0")
    span_group(net, None)
    after = [type(layer) for layer in net.modules()]
    expected = {BatchNormAct2d: GroupBatchNormAct2d, nn.BatchNorm2d: GroupBatchNorm2d}
    assert after == [expected.get(kind, kind) for kind in kinds]
    assert GroupBatchNormAct2d in after
    for name, value in net.state_dict().items():
        assert value is before[name] or torch.equal(value, before[name])


@pytest.mark.parametrize("shape", [(2, 3, 5, 5)])
def test_evaluation_equals_the_native_layers(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for layer in (nn.BatchNorm2d(3), BatchNormAct2d(3)):
        nn.init.uniform_(layer.weight)
        expected = layer.eval()(x)
        spanning = nn.Sequential(layer)
        span_group(spanning, None)
        assert torch.equal(spanning.eval()(x), expected)


def test_a_batch_norm_of_another_kind_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm3d(3))
    message = "a-0: layer 1 is a batch norm of type BatchNorm3d.*--batch-norm local"
    with pytest.raises(UsageError, match=message):
        check_spanning(net, "a-0")
    with pytest.raises(UsageError, match="without weights or running statistics"):
        check_spanning(nn.Sequential(nn.BatchNorm2d(3, affine=False)), "a-0")


ALONE = "--batch-norm group, because {} processes share a micro-batch"


@pytest.mark.parametrize(
    ("processes", "batch", "parts", "batch_norm", "placement", "message"),
    [
        (2, 2, 1, "local", "replicate", ALONE.format(2)),
        (2, 3, 1, "local", "replicate", ALONE.format(2)),  # slices of 2 images and of 1
        (2, 4, 2, "local", "replicate", ALONE.format(2)),
        (4, 4, 1, "local", "replicate", ALONE.format(4)),
        (4, 3, 1, "local", "split", "test_resnet-0 cannot learn from a single image"),
        (1, 2, 2, "group", "auto", "raise --batch-size or lower --grad-accum"),
        (1, 2, 1, "local", "auto", ""),
        (2, 2, 1, "group", "replicate", ""),
        (2, 4, 1, "local", "replicate", ""),
        (2, 2, 1, "local", "split", ""),  # each peer has a process of its own
        (4, 4, 1, "local", "split", ""),
    ],
)
def test_a_batch_norm_that_would_see_one_value_is_refused_before_the_start(
    processes: int,
    batch: int,
    parts: int,
    batch_norm: str,
    placement: str,
    message: str,
    digits: Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if processes > 1:
        world = {"WORLD_SIZE": str(processes), "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in world.items():
            monkeypatch.setenv(name, value)
    config = tiny_config(
        cohort=("timm:test_resnet*2",),  # 1 x 1 maps
        batch_size=batch,
        grad_accum=parts,
        batch_norm=batch_norm,
        placement=placement,
    )
    if not message:
        setup.check(config, digits)
        return
    with pytest.raises(UsageError, match="cannot learn from a single image.*see one v") as refusal:
        setup.check(config, digits)
    assert message in str(refusal.value)
    if placement == "replicate":
        net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
        images = digits.train.images[:8].float().permute(0, 3, 1, 2), digits.train.labels[:8]
        ours = Config(
            batch_size=batch, grad_accum=parts, batch_norm=batch_norm, float64=True, cpu=True
        )
        with pytest.raises(UsageError, match="own cannot learn from a single image"):
            learn({"own": net}, images, images, ours)


def test_one_process_keeps_the_native_layers_where_they_are_exact(
    training: Callable[..., Training],
) -> None:
    native, ours = {nn.BatchNorm2d, BatchNormAct2d}, {GroupBatchNorm2d, GroupBatchNormAct2d}
    for memory_format, float64, expected in (
        ("contiguous", False, native),
        ("channels_last", False, ours),
        ("channels_last", True, native),
    ):
        peers = training(
            cohort=("resnet8", "wrn_16_2"), memory_format=memory_format, float64=float64
        ).peers
        kinds = {type(layer) for peer in peers for layer in peer.net.modules()}
        assert kinds & (native | ours) == expected


# ---------------------------------------------------------------- channels last


@dataclass
class Passed:
    """What a layer makes of images and of gradients."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def through(cls, layer: nn.Module, x: Tensor, dy: Tensor) -> "Passed":
        x = x.detach().requires_grad_()
        y = layer(x)
        y.backward(dy)
        grads = (x.grad, layer.weight.grad, layer.bias.grad)
        return cls(y.detach(), *grads, layer.running_mean, layer.running_var)

    def error(self, exact: "Passed") -> float:
        """The largest difference to exact numbers, relative to the largest of each kind."""
        pairs = [(getattr(self, f.name), getattr(exact, f.name)) for f in fields(self)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def through_all(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, Passed]:
    """Return what a layer gives in double precision, and in single in both layouts, as torch's
    and as ours."""
    x, dy = 2 * torch.randn(shape) + 1, torch.randn(shape) + 0.1
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias)
    found = {"exact": Passed.through(copy.deepcopy(layer).double(), x.double(), dy.double())}
    last = [one.contiguous(memory_format=torch.channels_last) for one in (x, dy)]
    found["contiguous"] = Passed.through(copy.deepcopy(layer), x, dy)
    found["torch, channels_last"] = Passed.through(copy.deepcopy(layer), *last)
    ours = nn.Sequential(layer)
    span_group(ours, None)
    found["channels_last"] = Passed.through(layer, *last)
    return found


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(8), BatchNormAct2d(8), nn.BatchNorm2d(8, momentum=None)], ids=repr
)
def test_statistics_in_channels_last_are_as_exact_as_in_the_usual_layout(layer: nn.Module) -> None:
    found = through_all(layer, (64, 8, 32, 32))  # 65,536 pixels of each channel
    exact = found.pop("exact")
    errors = {name: one.error(exact) for name, one in found.items()}
    assert errors["channels_last"] < 5 * errors["contiguous"] < 1e-5
    assert errors["channels_last"] < errors["torch, channels_last"] / 3


@pytest.mark.parametrize(
    "shape",
    [
        (7, 3, 5, 5),  # 175 pixels, in blocks of 25
        (13, 2, 1, 1),  # one pixel an image
        (5, 2000, 3, 3),  # more channels than the width of a block
        (1, 5, 7, 7),
        (3, 1, 4, 4),  # one channel: both layouts are the same
        (2, 4, 1, 3),
    ],
)
def test_any_number_of_pixels_and_channels_can_be_cut_into_blocks(shape: tuple[int, ...]) -> None:
    found = through_all(nn.BatchNorm2d(shape[1]), shape)
    assert found["channels_last"].error(found["exact"]) < 2e-5
    for own in (found["channels_last"].y, found["channels_last"].dx):
        assert own.is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_of_another_layout_is_the_same_gradient() -> None:
    layer, x, dy = nn.BatchNorm2d(6), torch.randn(4, 6, 8, 8), torch.randn(4, 6, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    ours = nn.Sequential(layer)
    span_group(ours, None)
    found = [
        Passed.through(copy.deepcopy(layer), x, one)
        for one in (dy, dy.contiguous(memory_format=torch.channels_last))
    ]
    assert found[0].error(found[1]) == 0


@pytest.mark.skipif(not adds_up_in_pairs(), reason="older torches compile in the usual layout")
def test_compiled_statistics_in_channels_last_are_exact_too() -> None:
    layer, x = nn.BatchNorm2d(8), 2 * torch.randn(64, 8, 32, 32) + 1
    dy = (torch.randn_like(x) + 0.1).contiguous(memory_format=torch.channels_last)
    exact = Passed.through(copy.deepcopy(layer).double(), x.double(), dy.double())
    ours = nn.Sequential(layer)
    span_group(ours, None)
    ours.compile(dynamic=False)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ours(last)
    y.backward(dy)
    found = Passed(
        y.detach(),
        last.grad,
        layer.weight.grad,
        layer.bias.grad,
        layer.running_mean,
        layer.running_var,
    )
    assert found.error(exact) < 1e-5


def test_half_precision_keeps_torchs_own_kernels() -> None:
    x = torch.randn(4, 6, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    layer = nn.BatchNorm2d(6)
    expected = copy.deepcopy(layer)(x)
    ours = nn.Sequential(layer)
    span_group(ours, None)
    assert torch.equal(layer(x), expected)


# ---------------------------------------------------------------- CUDA's fused kernels


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def gather_stats(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    var = (share * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (var + eps).rsqrt()


def elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> Tensor:
    return wide(weight * inverse) * (x - wide(mean)) + wide(bias)


def backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *_: bool
) -> tuple[Tensor, ...]:
    sum_dy = grad.sum((0, 2, 3))
    sum_dy_x = (grad * (x - wide(mean))).sum((0, 2, 3))
    return sum_dy, sum_dy_x, sum_dy_x * inverse, sum_dy


def backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_x: Tensor,
    counts: Tensor,
) -> Tensor:
    through = wide(sum_dy) + (x - wide(mean)) * wide(inverse**2 * sum_dy_x)
    return wide(weight * inverse) * (grad - through / counts.sum())


def wide(channels: Tensor) -> Tensor:
    return channels[:, None, None]


class Pair:
    """Two processes as two threads of this one."""

    def __init__(self) -> None:
        self._all_here = threading.Barrier(2)
        self._sent: dict[int, Tensor] = {}
        self._mine = threading.local()

    def run(self, part: Callable[[int], None]) -> None:
        def work(rank: int) -> None:
            self._mine.rank = rank
            part(rank)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, rank) for rank in range(2)]:
                done.result(timeout=20)

    def get_world_size(self, group: object) -> int:
        return 2

    def _exchange(self, ours: Tensor) -> list[Tensor]:
        self._sent[self._mine.rank] = ours.clone()
        self._all_here.wait(timeout=20)
        found = [self._sent[rank] for rank in range(2)]
        self._all_here.wait(timeout=20)
        return found

    def all_gather(self, rows: list[Tensor], ours: Tensor, group: object) -> None:
        for row, sent in zip(rows, self._exchange(ours), strict=True):
            row.copy_(sent)

    def all_reduce(self, sums: Tensor, group: object) -> None:
        sums.copy_(sum(self._exchange(sums)))


def test_fused_kernels_give_what_one_process_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernels are written down as plain formulas: what they are given and what becomes of their
    # results is tested, not the kernels. Slices are uneven.
    kernels = (stats, elemt, backward_reduce, backward_elemt)
    for kernel in kernels:
        monkeypatch.setattr(torch, f"batch_norm_{kernel.__name__}", kernel)
    monkeypatch.setattr(torch, "batch_norm_gather_stats_with_counts", gather_stats)
    pair = Pair()
    monkeypatch.setattr(batchnorm, "dist", pair)
    x, dy = torch.randn(2, 7, 3, 4, 4, dtype=torch.float64)
    x += torch.arange(7, dtype=torch.float64).view(7, 1, 1, 1)  # slices differ in mean
    whole = nn.BatchNorm2d(3).double()
    nn.init.uniform_(whole.weight)
    nn.init.uniform_(whole.bias)
    layers, inputs, outputs = [], [x[:2].clone(), x[2:].clone()], {}
    for _ in range(2):
        spanning = nn.Sequential(copy.deepcopy(whole))
        span_group(spanning, None)
        layers.append(spanning[0])

    def part(rank: int) -> None:
        own, layer = inputs[rank].requires_grad_(), layers[rank]
        y = batchnorm._FusedNormalise.apply(own, layer.weight, layer.bias, layer, 0.1)
        outputs[rank] = y
        y.backward(dy[:2] if rank == 0 else dy[2:])

    pair.run(part)
    x.requires_grad_()
    y = whole(x)
    y.backward(dy)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(torch.cat([outputs[0], outputs[1]]), y)
    close(torch.cat([one.grad for one in inputs]), x.grad)
    close(layers[0].weight.grad + layers[1].weight.grad, whole.weight.grad)
    close(layers[0].bias.grad + layers[1].bias.grad, whole.bias.grad)
    for layer in layers:
        close(layer.running_mean, whole.running_mean)
        close(layer.running_var, whole.running_var)


def test_blocks_of_two_processes_give_what_one_process_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Single precision in channels last; slices are uneven. Weight and bias get each one's part.
    pair = Pair()
    monkeypatch.setattr(pair, "get_rank", lambda group: pair._mine.rank, raising=False)
    monkeypatch.setattr(batchnorm, "dist", pair)
    x, dy = torch.randn(2, 7, 3, 4, 4)
    x += torch.arange(7.0).view(7, 1, 1, 1)  # slices differ in mean
    x, dy = (one.contiguous(memory_format=torch.channels_last) for one in (x, dy))
    whole = nn.BatchNorm2d(3)
    nn.init.uniform_(whole.weight)
    nn.init.uniform_(whole.bias)
    layers = []
    for _ in range(2):
        spanning = nn.Sequential(copy.deepcopy(whole))
        span_group(spanning, object())
        layers.append(spanning[0])
    parts = (slice(0, 2), slice(2, 7))
    found: dict[int, Passed] = {}

    def part(rank: int) -> None:
        found[rank] = Passed.through(layers[rank], x[parts[rank]], dy[parts[rank]])

    pair.run(part)
    expected = Passed.through(whole.double(), x.double(), dy.double())
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=2e-6)
    for name in ("y", "dx"):
        both = torch.cat([getattr(found[rank], name) for rank in range(2)])
        close(both.double(), getattr(expected, name))
    for name in ("dweight", "dbias"):
        both = getattr(found[0], name) + getattr(found[1], name)
        # Of 112 numbers whose sizes add up to about 90, each rounded to 24 bits.
        close(both.double(), getattr(expected, name), atol=90 * 2**-24)
    for rank in range(2):
        close(found[rank].mean.double(), expected.mean)
        close(found[rank].var.double(), expected.var)
