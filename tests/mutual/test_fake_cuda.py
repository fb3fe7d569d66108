"""Steps, evaluation and checkpoints on CUDA tensors without a GPU (``tests/fake_cuda.py``).

A test fails if devices or dtypes do not fit, if the host waits for the device within a step, or if
a step starts more operations than it did.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from dml_accel.core.config import Config
from dml_accel.core.versions import torch_release
from dml_accel.data.given import read_given
from dml_accel.training import checkpoint, loop
from tests.fake_cuda import CUDA, FakeTraining, backward, fake_cuda, fake_tensors

TORCH = torch_release()
pytestmark = pytest.mark.skipif(
    TORCH < (2, 14),
    reason="fake CUDA tensors with gradients ask the driver for a stream in torch 2.6, not in 2.14",
)

PRECISIONS: list[dict[str, Any]] = [
    {},
    {"mixed_precision": "bf16"},
    {"mixed_precision": "fp16"},
    {"float64": True},
]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"low_memory": True},
    {"update": "sequential"},
    {"update": "official"},
]
SPLIT: dict[str, Any] = {"placement": "split"}
TAUGHT_BY_AVERAGES: dict[str, Any] = {"ema": 0.9, "teach_with": "ema"}
TWO_FROZEN = {"frozen_peers": ("a", "b")}
CASES = [
    *((1, a | b) for a, b in itertools.product(SCHEDULES, PRECISIONS[:3])),
    (1, PRECISIONS[3]),
    *((2, a) for a in SCHEDULES),
    *((2, a) for a in PRECISIONS[1:]),
    *((2, SPLIT | a) for a in PRECISIONS),
    (2, SPLIT | {"low_memory": True, "mixed_precision": "fp16"}),
    (1, {"links": "ring", "clip_norm": 1.0}),
    (1, {"labelled_fraction": 0.5}),
    (1, {"kl_weight": 0.0, "mixed_precision": "fp16", "clip_norm": 1.0}),
    (1, {"target": "mean-logit", "temperature": 2.0}),
    (1, {"grad_accum": 2, "mixed_precision": "bf16", "memory_format": "channels_last"}),
    (1, TWO_FROZEN | {"links": "frozen", "mixed_precision": "bf16"}),
    (1, TWO_FROZEN | {"update": "sequential"}),
    (1, {"ema": 0.9}),
    (1, TAUGHT_BY_AVERAGES | {"mixed_precision": "fp16"}),
    (1, TAUGHT_BY_AVERAGES | {"low_memory": True, "grad_accum": 2}),
    (1, {"exchange_every": 2, "mixed_precision": "fp16"}),
    (2, SPLIT | {"exchange_every": 2, "grad_accum": 2}),
    (2, {"links": "ring", "grad_accum": 2}),
    (2, {"labelled_fraction": 0.5, "update": "official", "grad_accum": 2}),
    (2, {"batch_norm": "local", "clip_norm": 1.0}),
    (2, {"kl_weight": 0.0}),
    (2, SPLIT | {"exchange": "sum", "mixed_precision": "bf16"}),
    (2, SPLIT | {"exchange_dtype": "bf16"}),
    (2, SPLIT | TAUGHT_BY_AVERAGES | {"exchange": "sum", "float64": True}),
    (2, SPLIT | {"links": "ring"}),
    (2, SPLIT | TWO_FROZEN | {"labelled_fraction": 0.5, "grad_accum": 2}),
    (2, SPLIT | {"target": "mean-logit", "exchange": "sum"}),
    (1, {"divergence": "dkd", "standardize": True, "gate": "correct"}),
    (2, SPLIT | {"divergence": "renyi", "gate": "correct", "mixed_precision": "bf16"}),
    (1, {"target": "best", "low_memory": True}),
    (1, {"target": "min-logit", "divergence": "jsd"}),
    (1, {"update": "switch", "labelled_fraction": 0.5, "kl_images": "labelled"}),
    (2, SPLIT | {"update": "switch", "float64": True}),
    (1, {"mixup": 1.0, "label_smoothing": 0.1, "augment": ("crop", "erasing")}),
    (1, {"mixup": 1.0, "label_smoothing": 0.1, "class_weights": "balanced"}),
    (2, SPLIT | {"class_weights": "balanced", "labelled_fraction": 0.5, "float64": True}),
    (2, SPLIT | {"cutmix": 1.0, "grad_accum": 2, "augment": ("crop", "erasing")}),
]


def build(processes: int, **changes: Any) -> FakeTraining:
    settings = {"cohort": ("resnet8*2",), "dataset": "digits", "image_size": 16, "batch_size": 8}
    return FakeTraining(Config(**(settings | changes)), processes)


@pytest.mark.parametrize(("processes", "changes"), CASES, ids=str)
def test_a_step_stays_on_the_device_and_waits_for_nothing(
    processes: int, changes: dict[str, Any]
) -> None:
    with fake_cuda(processes):
        it = build(processes, **changes)
        losses, recorder = it.step()
    wide = torch.float64 if changes.get("float64") else torch.float32
    assert (losses.shape, losses.device, losses.dtype) == ((2, 3), CUDA, wide)
    assert not recorder.waits
    for peer in it.peers:
        assert_on_device(peer, wide)


@pytest.mark.parametrize("precision", [{}, {"mixed_precision": "fp16", "clip_norm": 1.0}], ids=str)
def test_fused_adamw_waits_for_nothing(precision: dict[str, Any]) -> None:
    with fake_cuda():
        it = build(1, optimizer="adamw", **precision)
        _, recorder = it.step()
    assert not recorder.waits
    assert "aten._fused_adamw_.default" in recorder.launches


def test_an_optimizer_that_is_not_fused_looks_at_the_loss() -> None:
    with fake_cuda():
        it = build(1, optimizer="lion")
        with pytest.raises(DataDependentOutputException):  # a fake loss has no number to read
            it.step()


def assert_on_device(peer: Any, wide: torch.dtype) -> None:
    for weight in peer.module.parameters():
        momentum = peer.optimizer.state[weight]["momentum_buffer"]
        for tensor in (weight, momentum, weight.grad):
            assert (tensor.device, tensor.dtype) == (CUDA, wide)
    for buffer in peer.module.buffers():
        assert buffer.device == CUDA
        assert buffer.dtype == (wide if buffer.is_floating_point() else torch.int64)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {}),
        (1, {"mixed_precision": "fp16"}),
        (2, {"batch_norm": "local"}),
        (2, SPLIT | {"float64": True}),
    ],
    ids=str,
)
def test_evaluation_waits_only_at_its_end(
    processes: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # ``finish`` divides the sums on the host.
    monkeypatch.setattr(loop, "finish", lambda sums, *_: sums)
    with fake_cuda(processes):
        it = build(processes, **changes)
        with it.recording() as recorder:
            sums: Any = loop.evaluate(it.peers, it.data.test, 10, it.cohort.placement)
    assert (sums.device, sums.dtype) == (CUDA, torch.float64)
    assert not recorder.waits


def test_learn_takes_tensors_from_a_device() -> None:
    # Images are measured, and orders drawn, on the host: these would be on two devices there.
    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with fake_cuda(), fake_tensors():
        split = read_given("train", (images.to(CUDA), labels.to(CUDA))).held
    assert split is not None
    assert {split.images.device.type, split.labels.device.type} == {"cpu"}


@pytest.mark.parametrize("changes", [{}, {"mixed_precision": "fp16"}, {"float64": True}], ids=str)
def test_checkpoints_come_from_the_device_and_return_to_it(changes: dict[str, Any]) -> None:
    wide = torch.float64 if changes.get("float64") else torch.float32
    with fake_cuda():
        it = build(1, **changes)
        with it.recording():
            tensors, rest = checkpoint.pack(it.peers[0])
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
        read = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
        with it.recording():
            checkpoint.unpack(it.peers[0], read, rest)
        it.step()
    assert_on_device(it.peers[0], wide)


# ---------------------------------------------------------------- operations of a step


@pytest.mark.skipif(TORCH != (2, 15), reason="the numbers are those of torch 2.15")
@pytest.mark.parametrize(
    ("processes", "changes", "most"),
    [
        (1, {}, 227),
        (1, {"cohort": ("resnet32*4",)}, 1047),
        (1, {"mixed_precision": "bf16", "links": "ring"}, 269),
        (2, {}, 358),
        (2, SPLIT, 179),
    ],
    ids=str,
)
def test_a_step_starts_no_more_operations_than_it_did(
    processes: int, changes: dict[str, Any], most: int
) -> None:
    # Each costs the host some microseconds, which is what a step of small networks waits for.
    # If a step starts fewer, write down the smaller number.
    with fake_cuda(processes):
        it = build(processes, **changes)
        _, recorder = it.step()
    assert recorder.launches.total() == most, recorder.launches.most_common()


def test_fused_batch_norm_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DML_FUSED_BATCH_NORM", "0")
    with fake_cuda(2):
        _, recorder = build(2, cohort=("resnet8",)).step()
    assert not recorder.waits
    assert "aten.batch_norm_stats.default" not in recorder.launches
    assert "aten.var_mean.correction" in recorder.launches


# ---------------------------------------------------------------- the watching itself

MEETINGS = {
    "copied to the host": (True, lambda x: x.cpu()),
    "copied into the host": (True, lambda x: torch.ones(3).copy_(x)),
    "a list as an index": (True, lambda x: x[[0, 2]]),
    "a list as an index, set": (True, lambda x: x.__setitem__([0, 2], x[:2])),
    "made on the host": (True, lambda x: torch.tensor([1.0, 2.0], device=x.device)),
    "copied to the device": (True, lambda x: torch.ones(3).to(x.device)),
    "copied into the device": (True, lambda x: x.copy_(torch.ones(3))),
    "copied in passing": (False, lambda x: torch.ones(3).to(x.device, non_blocking=True)),
    "a number on the host": (False, lambda x: x * torch.tensor(2.0)),
    "a slice": (False, lambda x: x[1:]),
    "made on the device": (False, lambda x: torch.full((2,), 1.0, device=x.device)),
}


@pytest.mark.parametrize(("waits", "action"), MEETINGS.values(), ids=MEETINGS)
def test_waiting_is_noted(waits: bool, action: Any) -> None:
    with fake_cuda(), fake_tensors() as recorder:
        action(torch.zeros(3, device=CUDA))
    assert bool(recorder.waits) == waits


def test_views_start_nothing() -> None:
    with fake_cuda(), fake_tensors() as recorder:
        x = torch.zeros(4, device=CUDA)
        _ = x.view(2, 2).T, x[1:], x.detach(), torch.empty_like(x)
        assert dict(recorder.launches) == {"aten.zeros.default": 1}


@pytest.mark.parametrize(
    "action",
    [Tensor.item, Tensor.tolist, torch.nonzero, lambda x: x[x > 0], lambda x: x + torch.ones(3)],
)
def test_reading_and_mixing_devices_fail(action: Any) -> None:
    with fake_cuda(), fake_tensors(), pytest.raises((RuntimeError, NotImplementedError)):
        action(torch.zeros(3, device=CUDA))


def test_backward_is_that_of_torch() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    )
    x, given = torch.randn(5, 3, 4, 4), torch.randn(5, 2)
    expected = torch.autograd.grad(net(x), list(net.parameters()), given)
    for _ in range(2):  # gradients add up
        backward(net(x), given)
    for weight, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, 2 * gradient)
