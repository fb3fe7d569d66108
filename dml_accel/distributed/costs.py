"""What an image costs a network: operations, memory and time, counted or timed on this machine."""

import contextlib
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dml_accel.core.config import OptimConfig
from dml_accel.core.files import write_json
from dml_accel.core.host import cache_dir
from dml_accel.data.batches import ImageFormat
from dml_accel.models.build import parameter_count, set_memory_format
from dml_accel.models.optim import make_optimizer
from dml_accel.models.spec import PeerSpec

_KEPT = "costs.json"
_TIMED_STEPS = 5
_TIMED_ROWS_ON_A_CPU = 16


@dataclass(frozen=True)
class Cost:
    """What training a network costs.

    Attributes:
        macs: multiply-accumulate operations of the forward pass of one image.
        parameters: of the network.
        activation_bytes: what the forward pass of one image keeps for the backward pass.
        norms: batch norm layers.
        channels: of all batch norm layers together.
        operations: that the forward pass starts, without views and allocations.
        seconds: one image's share of a step, if it was timed.
        optimizer_state: numbers that the optimizer keeps for each parameter.
        state_bytes: of parameters and buffers.
        dtypes: how many dtypes these have, which are sent apart.
        largest_bytes: of the largest tensor that the forward pass of one image keeps.
    """

    macs: int
    parameters: int
    activation_bytes: int
    norms: int
    channels: int
    operations: int = 0
    seconds: float | None = None
    optimizer_state: float = 1.0
    state_bytes: int = 0
    dtypes: int = 1
    largest_bytes: int = 0


class _Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += not (func.is_view or "empty" in func.name())  # neither computes anything
        return func(*args, **(kwargs or {}))


def count(module: nn.Module, image_size: int) -> Cost:
    """Count what a network costs by one forward pass, which leaves it as it was."""
    weight = next(module.parameters())
    image = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    learned = {parameter.data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in learned:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    module.eval()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = module(image)  # kept alive, so that no address is used twice
    with FlopCounterMode(display=False) as counter, _Operations() as started, torch.no_grad():
        module(image)
    module.train()
    del logits
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    state = [*module.parameters(), *module.buffers()]
    return Cost(
        counter.get_total_flops() // 2,
        parameter_count(module),
        sum(kept.values()),
        len(layers),
        sum(layer.num_features for layer in layers),
        started.count,
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state),
        dtypes=len({tensor.dtype for tensor in state}),
        largest_bytes=max(kept.values(), default=0),
    )


def seconds_of_step(
    net: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor
) -> float:
    """Return the seconds of a forward pass, a backward pass and an update."""
    start = time.perf_counter()
    optimizer.zero_grad()
    net(images).float().logsumexp(1).mean().backward()
    optimizer.step()
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def timed(
    specs: Sequence[PeerSpec],
    modules: Mapping[str, nn.Module],
    optim: OptimConfig,
    precision: str,
    images: ImageFormat,
    processes: int = 1,
) -> dict[str, float]:
    """Return the seconds of one image's share of a step of each peer, measured on this machine.

    Each architecture is measured once; the times are kept in the folder of decoded images.

    Args:
        specs: the peers.
        modules: their networks, left as they are.
        optim: the optimizer.
        precision: mixed precision: ``no``, ``bf16`` or ``fp16``.
        images: what the networks are given, and where they are trained.
        processes: that share a batch.
    """
    folder = cache_dir()
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((folder / _KEPT).read_text(encoding="utf-8")) if folder else {}
    found = {}
    for spec in specs:
        device = images.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        rows = _timed_rows(device, optim, processes)
        where = (name, torch.get_num_threads(), images, precision, torch.__version__, rows)
        own = optim.of_peer(spec.name)
        key = repr((spec.arch, spec.arguments, own.optimizer, own.opt_args, *where))
        if key not in known:
            known[key] = _measure(modules[spec.name], own, precision, images, rows)
            with contextlib.suppress(OSError):  # then they are measured again next time
                if folder:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(folder / _KEPT, known)
        found[spec.name] = float(known[key])
    return found


def _timed_rows(device: torch.device, optim: OptimConfig, processes: int) -> int:
    """Return how many images are timed: on a CPU each costs the same, and few are faster."""
    if device.type == "cpu":
        return _TIMED_ROWS_ON_A_CPU
    # A GPU computes a few images in the time of many: those that a process has under replicate.
    # Batch norm that spans no processes here cannot learn from one.
    return max(2, optim.smallest_micro_batch // processes)


def _measure(
    module: nn.Module, optim: OptimConfig, precision: str, images: ImageFormat, rows: int
) -> float:
    module = copy.deepcopy(module).to(images.device)
    set_memory_format(module, images.layout)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def net(x: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
            return module(x)

    optimizer, x = make_optimizer(module, optim), images.noise(rows)
    times = [seconds_of_step(net, optimizer, x) for _ in range(_TIMED_STEPS + 1)]
    return median(times[1:]) / rows  # without the first, which warms up
