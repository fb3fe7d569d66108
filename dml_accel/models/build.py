"""Networks of peers: built from a specification, or refused with what would fit."""

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.rng import key
from dml_accel.models.pretrained import PretrainedWeights, build_pretrained
from dml_accel.models.rehearsal import logits_problem, require_trainable
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
    layout: torch.memory_format = torch.contiguous_format,
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
        layout: of the images that it will be given.

    Raises:
        UsageError: timm does not accept the arguments, the weights belong to another network, or
            the network cannot take the image size or the layout.
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
    require_trainable(spec.name, net, dtype)
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(2, 3, image_size, image_size)
    require_learning(spec.name, net, images, classes, smallest_micro_batch)
    if layout != torch.contiguous_format:
        images = images.contiguous(memory_format=layout)
        reason, _ = logits_problem(net, images, classes, train=True)
        if reason:
            raise UsageError(
                f"{spec.name} cannot be trained in channels_last: it {reason}; add --memory-format "
                "contiguous"
            )
    # Not ``to(dtype)``, which would drop the imaginary part of complex buffers.
    return net.double() if dtype == torch.float64 else net


_KNOWN = ("torch", "torchvision", "timm", "dml_accel")


def require_learning(
    name: str,
    net: nn.Module,
    images: Tensor,
    classes: int,
    smallest_micro_batch: int,
    processes: int = 1,
    **options: Any,
) -> None:
    """Refuse a network that the first step would trip over; it is as before afterwards.

    Args:
        name: of the network, for messages.
        net: the network.
        images: two of those that it is given, [2, ...], or one.
        classes: how many there are.
        smallest_micro_batch: images; batch norm cannot learn from one.
        processes: that share a micro-batch, and have batch statistics of their own.
        options: of ``rehearsal.logits_problem``.

    Raises:
        UsageError: see above.
    """
    counts = [min(2, len(images))] + [1] * (smallest_micro_batch // processes == 1)
    remedy = f"; or --batch-norm group, because {processes} processes share a micro-batch"
    for count in counts:
        reason, _ = logits_problem(net, images[:count], classes, train=True, **options)
        if reason and count < counts[0]:
            raise UsageError(
                f"{name} cannot learn from a single image at a time, because its batch norm would "
                "see one value per channel: raise --batch-size or lower --grad-accum"
                + remedy
                * (processes > 1)
            )
        if reason:
            raise UsageError(f"{name} cannot be trained: in training mode it {reason}")


def refuse_shared(networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks that have anything in common: each would be changed by the other's steps.

    That is a parameter, a buffer or another tensor, whole or in part, or a module that may keep
    something. Within a network everything may be shared.

    Raises:
        UsageError: there are two such networks; the text names both, and what they share.
    """
    remedy = "each network needs its own (copy.deepcopy)"
    places, starts = [], dict[int, tuple[str, str]]()
    for name, net in networks.items():
        for kind, place, tensor in _held_tensors(net):
            start, length = _memory(tensor)
            if length:
                first, what = starts.setdefault(start, (name, f"{kind} {place}"))
                if first != name:
                    raise UsageError(f"{first} and {name} share the {what}: {remedy}")
                places.append((start, start + length, name, f"{kind} {place}"))
    order = list(networks)
    ends: dict[str, tuple[int, str]] = {}  # of each network: the last address so far, and whose
    for start, end, name, what in sorted(places, key=lambda one: one[:2]):
        for other, (stop, shared) in ends.items():
            if other != name and start < stop:
                first, second = sorted((other, name), key=order.index)
                shown = shared if first == other else what
                raise UsageError(f"{first} and {second} share the {shown}: {remedy}")
        if end > ends.get(name, (0, ""))[0]:
            ends[name] = end, what
    owners: dict[int, tuple[str, str]] = {}
    for name, net in networks.items():
        for place, module in net.named_modules():
            first, what = owners.setdefault(id(module), (name, place))
            if first != name and _may_keep_something(module):
                raise UsageError(
                    f"{first} and {name} share the module {what} ({type(module).__name__}), which "
                    f"may keep something: {remedy}"
                )


def _held_tensors(net: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield kind, name and value of everything that a network computes with."""
    for name, weight in net.named_parameters():
        yield "weight", name, weight
    for name, buffer in net.named_buffers():
        yield "buffer", name, buffer
    for name, module in net.named_modules():
        for attribute, value in vars(module).items():
            place = f"{name}.{attribute}".lstrip(".")
            several = value.values() if isinstance(value, dict) else value
            several = several if isinstance(value, dict | list | tuple) else [value]
            for one in several if attribute not in ("_parameters", "_buffers", "_modules") else ():
                if isinstance(one, Tensor):
                    yield "tensor", place, one
                elif isinstance(one, nn.Module):
                    yield from (
                        ("tensor", place, tensor) for tensor in (*one.parameters(), *one.buffers())
                    )


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor and how many bytes it spans; 0 bytes if it has no memory."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0 or is_lazy(tensor):
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _may_keep_something(module: nn.Module) -> bool:
    """Whether a module without tensors of its own may remember what it has seen."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    # Layers of these packages keep nothing but tensors, which are compared anyway.
    return any(hooks) or type(module).__module__.split(".")[0] not in _KNOWN


_built: "weakref.WeakValueDictionary[int, Tensor]" = weakref.WeakValueDictionary()


def refuse_reused(networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks with a weight that an earlier run of this process has had, and has trained.

    Raises:
        UsageError: there is one; the text names it.
    """
    for name, net in networks.items():
        for place, weight in net.named_parameters():
            if _built.get(id(weight)) is weight:
                raise UsageError(
                    f"{name} has the weight {place} of a network that was built before: let its "
                    "function build all layers anew"
                )
    _built.update({id(one): one for net in networks.values() for one in net.parameters()})


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


def image_problem(net: nn.Module, size: int, classes: int) -> str:
    """Return why a network cannot take a single image; empty if it can.

    This leaves no trace in the network, which is in training mode afterwards.
    """
    net.eval()
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
    """Return arguments with which the network takes the image, tried out, and its own size.

    Those that change least come first: trained weights fit patches of their own size.
    """
    with torch.device("meta"):
        native = timm.create_model(spec.arch).default_cfg["input_size"][-1]
    whole = {"img_size": size}
    patches = whole | {"patch_size": max(1, size // 8)}
    windows = whole | {"patch_size": max(1, size // 16), "window_size": 4}
    found = []
    for arguments in (whole, patches, windows):
        try:
            net = timm.create_model(spec.arch, num_classes=classes, **spec.arguments | arguments)
        except Exception:  # every model family raises its own kinds
            continue
        if not image_problem(net, size, classes):
            text = ",".join(f"{name}={value}" for name, value in arguments.items())
            found.append(f"'timm:{spec.arch}[{text}]'")
    return " or ".join([", ".join(found[:2]), f"--image-size {native}"]).removeprefix(" or ")


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(weight.numel() for weight in module.parameters())


def memory_format(
    asked: str | None, dtype: torch.dtype, precision: str, device: torch.device
) -> torch.memory_format:
    """Return the memory layout of images and weights.

    On a CPU, channels last is 10 to 30% faster in single and half precision
    (benchmarks/speed.md). In double precision depthwise convolutions are half as fast in it, and
    on the GPU that was measured (benchmarks/gpu.md) networks in half precision were slower.

    Args:
        asked: ``--memory-format``; None for the default.
        dtype: of images and weights.
        precision: ``no``, ``bf16`` or ``fp16``.
        device: of the networks.
    """
    is_faster = device.type == "cpu" and (dtype == torch.float32 or precision == "bf16")
    default = "channels_last" if is_faster else "contiguous"
    return torch.channels_last if (asked or default) == "channels_last" else torch.contiguous_format


def set_memory_format(module: nn.Module, layout: torch.memory_format) -> None:
    """Give a network's weights the memory layout of its images, in place."""
    for weight in module.parameters():
        if weight.dim() == 4:  # the layouts are defined for images and for kernels of convolutions
            # Not ``contiguous``, which keeps the strides of kernels of one pixel or channel: their
            # order in memory is the same, but DDP compares the strides of gradients with theirs.
            laid_out = torch.empty_like(weight.data, memory_format=layout)
            if laid_out.stride() != weight.stride():
                weight.data = laid_out.copy_(weight.data)
