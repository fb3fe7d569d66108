"""CUDA tensors without a GPU: devices, dtypes, shapes and operations are real, numbers are not.

torch's ``FakeTensorMode`` gives tensors that say they are on CUDA and hold no numbers: an operation
that mixes devices or reads a number fails, as on a GPU. What it lacks is here:

    backward          a walk over the graph, because torch's own engine asks the driver for a stream
    Recorder          counts the operations, and notes those that make the host wait for the device
    _WITHOUT_A_FAKE   the results of CUDA's fused kernels, of which torch knows no fake

Nothing here says that a kernel computes the right numbers, or how long it takes.
"""

import contextlib
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dml_accel.core.config import Config
from dml_accel.data.batches import ImageFormat, Normalisation, PixelSet
from dml_accel.data.images import Data
from dml_accel.data.mixing import Mixing
from dml_accel.data.splits import Split
from dml_accel.distributed import placement, wrap
from dml_accel.distributed.launch import launched_precision
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import allocate, everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models import networks
from dml_accel.models.build import set_memory_format
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual import averages, teachers
from dml_accel.mutual.links import read_links
from dml_accel.mutual.step import train_step
from dml_accel.training import setup

CUDA = torch.device("cuda", 0)
IMAGES, CLASSES = 320, 10
# A frozen peer's folder: trained with another normalisation than the run's.
FROZEN: Any = SimpleNamespace(
    arch="resnet8_cifar", normalisation=Normalisation((0.4,) * 3, (0.2,) * 3)
)
aten = torch.ops.aten


# ---------------------------------------------------------------- what an operation does


class Recorder(TorchDispatchMode):
    """Watches the operations on CUDA tensors.

    Attributes:
        launches: how often each operation ran that starts work on the device; views do not.
        waits: the operations for which the host waits until the device has finished, and where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fake = _WITHOUT_A_FAKE.get(func.overloadpacket)
        given = _tensors((args, kwargs))
        if fake:
            assert {tensor.device for tensor in given} == {CUDA}, f"{func} mixes devices"
        if func is aten._local_scalar_dense.default and given[0].device == CUDA:
            self.waits.append(f"{func} at {_where()}")
        out = (fake or func)(*args, **kwargs)
        made = _tensors(out)
        if any(tensor.device == CUDA for tensor in [*given, *made]):
            if _launches(func, given):
                self.launches[str(func)] += 1
            if _waits(func, args, kwargs, given, made):
                self.waits.append(f"{func} at {_where()}")
        return out


_NO_WORK = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view}


def _launches(func: Any, given: list[Tensor]) -> bool:
    """Whether an operation starts work on the device."""
    if func.is_view or func.overloadpacket in _NO_WORK or func.namespace == "prim":
        return False
    # ``backward`` keeps the graph, and so copies cuDNN's workspace; torch's engine does not.
    return func is not aten.clone.default or given[0].dtype != torch.uint8


def _waits(func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether the host waits: a tensor is copied between host and device, and not in passing."""
    on_host = [tensor for tensor in given if tensor.device.type == "cpu"]
    if not on_host:
        return any(tensor.device.type == "cpu" for tensor in made)
    if func is aten.copy_.default and args[0].device.type == "cpu":
        return True
    if func in (aten._to_copy.default, aten.copy_.default):
        # Copied to the device without waiting: the host goes on once it has handed over the bytes.
        return not (kwargs.get("non_blocking") or args[2:3] == (True,))
    # A number on the host becomes an argument of an elementwise kernel.
    return torch.Tag.pointwise not in func.tags or any(tensor.dim() for tensor in on_host)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _where() -> str:
    """The innermost line of the package that is running."""
    lines = [frame for frame in traceback.extract_stack() if "/dml_accel/" in frame.filename]
    return f"{lines[-1].filename}:{lines[-1].lineno} {lines[-1].line}" if lines else "a test"


@contextlib.contextmanager
def fake_tensors(mode: FakeTensorMode | None = None) -> Iterator[Recorder]:
    """Make tensors fake, and watch what is done with them within the context."""
    with mode or FakeTensorMode(allow_non_fake_inputs=True), Recorder() as recorder:
        yield recorder


# ---------------------------------------------------------------- kernels without a fake


def _fused(weights: list[Tensor], *lists: list[Tensor], **options: Any) -> None:
    for weight, *others in zip(weights, *lists, strict=True):
        for other in others:
            # The kernel walks through all of them in memory order, and checks nothing.
            assert (other.shape, other.dtype, other.stride()) == (
                weight.shape,
                weight.dtype,
                weight.stride(),
            )
    for name in ("found_inf", "grad_scale"):
        assert options.get(name) is None or options[name].dtype == torch.float32, name


def _fused_adamw(*lists: list[Tensor], **options: Any) -> None:
    *whole, highest, steps = lists  # the highest second moments are there with amsgrad only
    assert not highest and all((one.shape, one.dtype) == ((), torch.float32) for one in steps)
    _fused(*whole, **options)


def _per_channel(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=wide)


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert _is_dense(x)
    return _per_channel(x), _per_channel(x)


def _gather_stats(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    like = _per_channel(x)
    assert means.shape == inverses.shape == (len(counts), len(like))
    assert means.dtype == inverses.dtype == like.dtype
    # The kernel reads these three as one type.
    assert counts.dtype == running_mean.dtype == running_var.dtype
    return _stats(x, eps)


def _elemt(x: Tensor, *channels: Any) -> Tensor:
    _require_channels(x, channels[:-1])
    return torch.empty_like(x)


def _backward_reduce(grad: Tensor, x: Tensor, *channels: Any) -> tuple[Tensor, ...]:
    _require_channels(x, channels[:3])
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    assert _is_dense(grad)
    like = _per_channel(x)
    return torch.empty_like(like), torch.empty_like(like), *_stats(x, 0.0)


def _backward_elemt(grad: Tensor, x: Tensor, *channels: Any) -> Tensor:
    _require_channels(x, channels[:-1])
    assert channels[-1].dtype == torch.int32
    return torch.empty_like(x)


def _require_channels(x: Tensor, channels: Sequence[Tensor]) -> None:
    like = _per_channel(x)
    assert _is_dense(x)
    assert all((one.shape, one.dtype) == (like.shape, like.dtype) for one in channels)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


_WITHOUT_A_FAKE: dict[Any, Callable[..., Any]] = {
    aten._fused_sgd_: _fused,
    aten._fused_adamw_: _fused_adamw,
    aten._amp_foreach_non_finite_check_and_unscale_: lambda *_: None,
    aten._amp_update_scale_: lambda scale, *_: scale,
    aten.batch_norm_stats: _stats,
    aten.batch_norm_gather_stats_with_counts: _gather_stats,
    aten.batch_norm_elemt: _elemt,
    aten.batch_norm_backward_reduce: _backward_reduce,
    aten.batch_norm_backward_elemt: _backward_elemt,
}


# ---------------------------------------------------------------- backward


def backward(root: Tensor, gradient: Tensor) -> None:
    """Run every node of a graph once all that it feeds have run, as torch's engine does."""
    assert (gradient.shape, gradient.device) == (root.shape, root.device)
    feeds: Counter[Any] = Counter()  # edges into each node that are not done yet
    nodes = [root.grad_fn]
    for node in nodes:
        for after, _ in node.next_functions:
            if after is not None:
                feeds[after] += 1
                if feeds[after] == 1:
                    nodes.append(after)
    sums: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    sums[root.grad_fn][root.output_nr] = gradient
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        given = [sums[node].get(place) for place in range(len(node._input_metadata))]
        for (after, place), passed in zip(node.next_functions, _apply(node, given), strict=True):
            if after is None:
                continue
            if passed is not None:
                # The sum over what was broadcast, in the precision of the forward pass.
                like = after._input_metadata[place]
                passed = passed.sum_to_size(*like.shape).to(like.dtype)
                before = sums[after].get(place)
                sums[after][place] = passed if before is None else before + passed
            feeds[after] -= 1
            if not feeds[after]:
                ready.append(after)


@torch.no_grad()
def _apply(node: Any, given: list[Tensor | None]) -> Sequence[Tensor | None]:
    if hasattr(node, "variable"):
        _accumulate(node.variable, given[0])
        return ()
    if all(one is None for one in given):
        return [None] * len(node.next_functions)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # Ours: tensors come first among their arguments, and what follows has no gradient.
        return node.apply(*given)[: len(node.next_functions)]
    passed = node(*given)
    return passed if isinstance(passed, tuple) else (passed,)


def _accumulate(weight: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    assert (gradient.shape, gradient.dtype) == (weight.shape, weight.dtype)
    assert gradient.device == weight.device
    if weight.grad is not None:
        weight.grad += gradient
    elif gradient.stride() == weight.stride():
        weight.grad = gradient
    else:
        weight.grad = torch.empty_like(weight).copy_(gradient)


# ---------------------------------------------------------------- a run


class FakeProcesses(Processes):
    """One of the processes of a run on GPUs; the others never answer, and need not."""

    def __init__(self, accelerator: Accelerator, rank: int, world_size: int) -> None:
        self.accelerator, self.device = accelerator, CUDA
        self.rank, self.world_size, self._liveness = rank, world_size, None


class _NoAverage(nn.Module):
    """Stands in for DDP, which needs numbers: its reducer runs inside torch's own engine."""

    def __init__(self, net: nn.Module, **_: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def fake_cuda(processes: int = 1) -> Iterator[None]:
    """Let this process believe that it has a GPU, and that ``processes`` share the work."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        patch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(Tensor, "backward", lambda self, g=None: backward(self, _ones(self, g)))
        patch.setattr(teachers, "load_network", _frozen_network)
        patch.setattr(setup, "copy_of", _real_copy)
        for module in (wrap, placement):
            patch.setattr(module, "DistributedDataParallel", _NoAverage)
        # Weights are replaced when they are moved: a real one cannot become fake in place.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        if processes > 1:
            last = processes - 1
            dist.init_process_group("fake", store=FakeStore(), rank=last, world_size=processes)
            stack.callback(dist.destroy_process_group)
        yield


def _frozen_network(_: Any) -> nn.Module:
    with unset_fake_temporarily():
        return networks.resnet8_cifar(num_classes=CLASSES).eval()


def _real_copy(module: nn.Module, name: str) -> nn.Module:
    with unset_fake_temporarily():  # it has not been moved to the device yet
        return averages.copy_of(module, name)


def _ones(root: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.ones_like(root) if gradient is None else gradient


def _accelerator(precision: str) -> Accelerator:
    """Accelerate's view of a process that has a GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    made = Accelerator(cpu=True, mixed_precision="no")
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = CUDA
    AcceleratorState._shared_state["_mixed_precision"] = precision
    made.native_amp = precision != "no"
    return made


class FakeTraining:
    """The parts of a run, built on fake tensors by the code that builds a run.

    Args:
        config: of the run; every one of its frozen peers is a ResNet-8.
        world_size: processes, of which this one is the last.

    Attributes:
        cohort: the peers of this process, and what they are trained with.
        data: the images.
    """

    def __init__(self, config: Config, world_size: int = 1) -> None:
        specs, precision = parse_cohort(config.cohort), launched_precision(config.numerics)
        processes = FakeProcesses(_accelerator(precision), world_size - 1, world_size)
        names = [spec.name for spec in specs]
        ranks = everywhere(names, world_size)
        if config.compute.placement == "split":
            ranks = allocate(dict.fromkeys(names, 1.0), world_size)
        format_ = setup.image_format(config, CUDA)
        modules = setup.build_networks(config, specs, CLASSES)
        for module in modules.values():
            set_memory_format(module, format_.layout)
        frozen = [f"frozen-{index}" for index in range(len(config.method.frozen_peers))]
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.recording():
            made = Placement(processes, ranks, config.numerics.batch_norm)
            self.data = _images(config, format_)
            self.cohort = setup.make_cohort(
                config,
                specs,
                modules,
                self.data,
                made,
                frozen=dict.fromkeys(frozen, FROZEN),
                links=read_links(config.method.links, names, frozen),
            )
            # The order of an epoch is drawn on the host and copied once, before its first step.
            self.data.train.batch(0, config.optim.batch_size, 0, 1)
        self.peers = list(self.cohort.peers)

    def recording(self) -> contextlib.AbstractContextManager[Recorder]:
        """Watch what is done within the context."""
        return fake_tensors(self._mode)

    def step(self) -> tuple[Tensor, Recorder]:
        """Take one optimizer step; return the parts of all peers' losses, and its operations."""
        with self.recording() as recorder:
            losses, _ = train_step(self.cohort, 0, 0.1, lambda: [False] * 3)
        return losses, recorder


def _images(config: Config, format_: ImageFormat) -> Data:
    """Return images without content; ``prepare`` would read their mean."""
    shape = (IMAGES, config.data.image_size, config.data.image_size, 3)
    split = Split(torch.zeros(shape, dtype=torch.uint8), torch.zeros(IMAGES, dtype=torch.int64))
    labelled = None
    if config.data.labelled_fraction < 1:
        labelled = torch.arange(int(IMAGES * config.data.labelled_fraction))
    options = {"seed": 0, "device": CUDA, "dtype": format_.dtype, "memory_format": format_.layout}
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3)
    train = PixelSet(
        split,
        normalisation,
        augment=config.data.augment or ("crop-flip",),
        labelled=labelled,
        mixing=Mixing.of(config.data),
        **options,
    )
    test = PixelSet(split, normalisation, augment=(), **options)
    return Data(train, None, test, tuple(map(str, range(CLASSES))), normalisation)
