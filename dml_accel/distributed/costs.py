"""What one image costs a network: arithmetic, memory, time. Counted, or timed on this machine."""

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dml_accel.core.config import Config
from dml_accel.core.files import write_json
from dml_accel.data.batches import lay_weights, memory_format
from dml_accel.data.decode import cache_dir
from dml_accel.models.build import parameter_count
from dml_accel.models.spec import PeerSpec, optimizer

_TIMED_STEPS = 5
_TIMED_ROWS = 16


@dataclass(frozen=True)
class Cost:
    """A network's cost in training.

    Attributes:
        macs: multiply-accumulates of one image's forward pass.
        parameters: numbers that it learns.
        activation_bytes: what one image's forward pass keeps for the backward pass.
        norms: batch norm layers.
        channels: channels of all of them together.
        seconds: of one image's share of a step, as timed; None where it was not.
    """

    macs: int
    parameters: int
    activation_bytes: int
    norms: int
    channels: int
    seconds: float | None = None


def count(module: nn.Module, image_size: int) -> Cost:
    """Count what a network costs by one forward pass; it is left as it was."""
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
        logits = module(image)  # held, so that no address is used twice
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    module.train()
    del logits
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return Cost(
        counter.get_total_flops() // 2,
        parameter_count(module),
        sum(kept.values()),
        len(layers),
        sum(layer.num_features for layer in layers),
    )


def timed(
    specs: Sequence[PeerSpec],
    modules: Mapping[str, nn.Module],
    config: Config,
    device: torch.device,
) -> dict[str, float]:
    """Return the seconds of one image's share of a step of each peer, measured on this machine.

    An architecture is measured once; the times are kept beside the decoded images.

    Args:
        specs: the peers.
        modules: their networks, left as they are.
        config: image size and precision.
        device: where they will be trained.
    """
    path = cache_dir() / "costs.json"
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    threads = torch.get_num_threads()
    found = {}
    for spec in specs:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        layout = str(memory_format(config, device))
        where = (name, threads, config.image_size, config.float64, config.mixed_precision, layout)
        key = repr((spec.arch, spec.arguments, *where, torch.__version__))
        if key not in known:
            known[key] = _seconds(modules[spec.name], config, device)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        found[spec.name] = float(known[key])
    return found


def _seconds(module: nn.Module, config: Config, device: torch.device) -> float:
    layout = memory_format(config, device)
    module = copy.deepcopy(module).to(device)
    lay_weights(module, layout)
    weight, size = next(module.parameters()), config.image_size
    images = torch.randn(_TIMED_ROWS, 3, size, size, dtype=weight.dtype, device=device)
    images = images.contiguous(memory_format=layout)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "")
    sgd, seconds = optimizer(module, config), []
    for _ in range(_TIMED_STEPS + 1):  # the first one warms up
        started = time.perf_counter()
        sgd.zero_grad()
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            loss = module(images).float().logsumexp(1).mean()
        loss.backward()
        sgd.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:]) / _TIMED_ROWS
