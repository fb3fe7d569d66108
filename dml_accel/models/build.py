"""Networks of peers: built and keyed, or refused with what would fit."""

import copy
import itertools
from collections.abc import Mapping

import timm
import torch
from torch import nn

from dml_accel.core.config import Config, UsageError
from dml_accel.core.rng import key
from dml_accel.models import pretrained
from dml_accel.models.pretrained import Weights
from dml_accel.models.spec import PeerSpec


def build(
    spec: PeerSpec, config: Config, classes: int, weights: Weights | None = None
) -> nn.Module:
    """Build the network of one peer on the CPU, in the run's precision.

    Args:
        spec: the peer.
        config: the run's.
        classes: of the images.
        weights: those that it starts from (default: untrained, drawn for the seed and its name).

    Raises:
        UsageError: timm does not accept the arguments, the weights are of another network, or the
            net cannot take the image size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("initial weights", config.seed, spec.name))
        try:
            if weights is not None:
                net = pretrained.build(spec.arch, spec.arguments, classes, weights)
            else:
                net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments)
        except UsageError as error:
            raise UsageError(f"{spec.name}: {error}") from error
        except Exception as error:  # every model family raises its own kinds
            reason = " ".join(str(error).split())
            raise UsageError(f"{spec.name} ({spec.arch}) cannot be built: {reason}") from error
    if not hasattr(net, "pretrained_cfg"):
        raise UsageError(
            f"{spec.name}: {spec.arch} has no pretrained_cfg, by which timm loads trained weights; "
            "let its function return timm.models.build_model_with_cfg(...)"
        )
    reason = refusal(net, config.image_size, classes)
    if reason:
        raise UsageError(
            f"{spec.name} cannot take {config.image_size} x {config.image_size} images ({reason}); "
            f"try {_remedy(spec, config.image_size, classes)}"
        )
    smallest = config.batch_size // config.grad_accum
    if smallest == 1 and refusal(copy.deepcopy(net), config.image_size, classes, train=True):
        raise UsageError(
            f"{spec.name} cannot learn from 1 image at a time (its batch norm sees one value per "
            f"channel), as --batch-size {config.batch_size} --grad-accum {config.grad_accum} asks"
        )
    return net.double() if config.float64 else net


def refuse_twins(modules: Mapping[str, nn.Module]) -> None:
    """Refuse two networks with equal weights: they would take equal steps, at KL 0, for ever.

    Raises:
        UsageError: there are such; both are named.
    """
    for (one, first), (other, second) in itertools.combinations(modules.items(), 2):
        a, b = list(first.parameters()), list(second.parameters())
        # Different ones differ in the first tensors, so that few are compared.
        if len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b, strict=True)):
            raise UsageError(
                f"{one} and {other} start with the same weights: they would stay equal, and learn "
                "nothing from each other; drop one, take another network, or leave one untrained"
            )


def refusal(net: nn.Module, size: int, classes: int, train: bool = False) -> str:
    """Say why a net cannot take one image; empty where it can.

    Without ``train`` that leaves no trace in the net, which is in training mode afterwards.
    """
    net.train(train)
    try:
        with torch.no_grad():
            shape = tuple(net(torch.zeros(1, 3, size, size)).shape)
        return "" if shape == (1, classes) else f"it returns shape {shape} and not (1, {classes})"
    except Exception as error:  # every model family raises its own kinds
        return " ".join(str(error).split())
    finally:
        net.train()


def _remedy(spec: PeerSpec, size: int, classes: int) -> str:
    """Name arguments under which the net takes the image, tried out, and its own image size."""
    with torch.device("meta"):
        native = timm.create_model(spec.arch).default_cfg["input_size"][-1]
    patches = {"img_size": size, "patch_size": max(1, size // 8)}
    windows = {"img_size": size, "patch_size": max(1, size // 16), "window_size": 4}
    for arguments in (patches, windows, {"img_size": size}):
        try:
            net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments | arguments)
        except Exception:  # every model family raises its own kinds
            continue
        if not refusal(net, size, classes):
            text = ",".join(f"{name}={value}" for name, value in arguments.items())
            return f"'timm:{spec.arch}[{text}]' or --image-size {native}"
    return f"--image-size {native}"


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers a network learns."""
    return sum(weight.numel() for weight in module.parameters())
