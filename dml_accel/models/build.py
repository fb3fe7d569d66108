"""Networks of peers: built from a specification, or refused with what would fit."""

import copy
import itertools
from collections.abc import Mapping

import timm
import torch
from torch import nn

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.rng import key
from dml_accel.models.pretrained import PretrainedWeights, build_pretrained
from dml_accel.models.spec import PeerSpec


def build(
    spec: PeerSpec,
    *,
    classes: int,
    image_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    smallest_micro_batch: int = 2,
    weights: PretrainedWeights | None = None,
) -> nn.Module:
    """Build the network of one peer on the CPU.

    Args:
        spec: the peer.
        classes: how many there are.
        image_size: pixels per side of its inputs.
        seed: of the run; keys the initial weights, together with the peer's name.
        dtype: ``torch.float32`` or ``torch.float64``.
        smallest_micro_batch: images; batch norm cannot learn from one.
        weights: to start from (default: random ones).

    Raises:
        UsageError: timm does not accept the arguments, the weights belong to another network, or
            the network cannot take the image size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("initial weights", seed, spec.name))
        try:
            if weights is not None:
                net = build_pretrained(spec.arch, spec.arguments, classes, weights)
            else:
                net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments)
        except UsageError as error:
            raise UsageError(f"{spec.name}: {error}") from error
        except Exception as error:  # every model family raises its own kinds
            raise UsageError(
                f"{spec.name} ({spec.arch}) cannot be built: {one_line(error)}"
            ) from error
    if not hasattr(net, "pretrained_cfg"):
        raise UsageError(
            f"{spec.name}: {spec.arch} has no pretrained_cfg, which timm needs to load trained "
            "weights; let its function return timm.models.build_model_with_cfg(...)"
        )
    reason = image_problem(net, image_size, classes)
    if reason:
        raise UsageError(
            f"{spec.name} cannot take {image_size} x {image_size} images ({reason}); try "
            f"{_remedy(spec, image_size, classes)}"
        )
    alone = smallest_micro_batch == 1
    if alone and image_problem(copy.deepcopy(net), image_size, classes, train=True):
        raise UsageError(
            f"{spec.name} cannot learn from a single image at a time, because its batch norm would "
            "see one value per channel: raise --batch-size or lower --grad-accum"
        )
    # Not ``to(dtype)``, which would drop the imaginary part of complex buffers.
    return net.double() if dtype == torch.float64 else net


def refuse_twins(modules: Mapping[str, nn.Module]) -> None:
    """Refuse networks with equal weights: their steps and predictions would stay equal, at KL 0.

    Raises:
        UsageError: there are two such networks; the text names both.
    """
    for (one, first), (other, second) in itertools.combinations(modules.items(), 2):
        a, b = list(first.parameters()), list(second.parameters())
        # Different networks differ in their first tensors, so few tensors are compared.
        if len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b, strict=True)):
            raise UsageError(
                f"{one} and {other} start with the same weights, so they would stay equal and "
                "learn nothing from each other: drop one, use another network, or leave one "
                "untrained"
            )


def image_problem(net: nn.Module, size: int, classes: int, train: bool = False) -> str:
    """Return why a network cannot take a single image; empty if it can.

    Without ``train`` this leaves no trace in the network, which is in training mode afterwards.
    """
    net.train(train)
    try:
        with torch.no_grad():
            shape = tuple(net(torch.zeros(1, 3, size, size)).shape)
        expected = (1, classes)
        return "" if shape == expected else f"it returns shape {shape}, not {expected}"
    except Exception as error:  # every model family raises its own kinds
        return one_line(error)
    finally:
        net.train()


def _remedy(spec: PeerSpec, size: int, classes: int) -> str:
    """Return arguments with which the network takes the image, tried out, and its own size."""
    with torch.device("meta"):
        native = timm.create_model(spec.arch).default_cfg["input_size"][-1]
    patches = {"img_size": size, "patch_size": max(1, size // 8)}
    windows = {"img_size": size, "patch_size": max(1, size // 16), "window_size": 4}
    for arguments in (patches, windows, {"img_size": size}):
        try:
            net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments | arguments)
        except Exception:  # every model family raises its own kinds
            continue
        if not image_problem(net, size, classes):
            text = ",".join(f"{name}={value}" for name, value in arguments.items())
            return f"'timm:{spec.arch}[{text}]' or --image-size {native}"
    return f"--image-size {native}"


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(weight.numel() for weight in module.parameters())


def memory_format(asked: str | None, precision: str, device: torch.device) -> torch.memory_format:
    """Return the memory layout of images and weights.

    On a CPU, channels last is 15 to 30% faster in single and half precision for all of our
    networks. But torch's batch norm then adds up one number after the other, and in single
    precision the sums over a batch are 60 times less exact; in half precision the error is below
    the rounding. In double precision depthwise convolutions are half as fast. GPUs were not
    measured.

    Args:
        asked: ``--memory-format``; None for the default.
        precision: ``no``, ``bf16`` or ``fp16``.
        device: of the networks.
    """
    default = "channels_last" if device.type == "cpu" and precision == "bf16" else "contiguous"
    return torch.channels_last if (asked or default) == "channels_last" else torch.contiguous_format


def set_memory_format(module: nn.Module, layout: torch.memory_format) -> None:
    """Give a network's weights the memory layout of its images, in place."""
    for weight in module.parameters():
        if weight.dim() == 4:  # the layouts are defined for images and for kernels of convolutions
            weight.data = weight.data.contiguous(memory_format=layout)
