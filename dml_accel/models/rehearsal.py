"""What a network does with a few images, tried before it is trained, without a trace in it.

Shape letters: B images, K classes.
"""

import collections
import contextlib
import functools
import gc
import random
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dml_accel.core.errors import UsageError, one_line


def require_trainable(name: str, net: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a network whose weights cannot be trained, whatever it computes.

    Args:
        name: of the network, for messages.
        net: the network.
        dtype: of the run: ``torch.float64`` converts all weights, ``torch.float32`` none.

    Raises:
        UsageError: it has no weights, they have other dtypes or several devices, or are frozen.
    """
    weights = dict(net.named_parameters())
    if not weights:
        raise UsageError(f"{name} has no parameters to train")
    for one, weight in weights.items():
        if is_lazy(weight):
            raise UsageError(f"{name}: the layer of {one} is lazy: call {name} on an image first")
        if weight.is_meta:
            raise UsageError(f"{name}: {one} is on the device meta, which holds no values")
        if weight.is_inference():
            raise UsageError(
                f"{name}: {one} was made under torch.inference_mode(): build {name} outside of it"
            )
        if not weight.is_floating_point():
            raise UsageError(f"{name}: {one} is {weight.dtype}; weights must be torch.float32")
        if weight.dtype != dtype and dtype != torch.float64:
            raise UsageError(
                f"{name}: {one} is {weight.dtype}, but weights must be torch.float32: call "
                f"{name}.float(), and choose the precision with Config(float64=True) or "
                "Config(mixed_precision='bf16')"
            )
    for one, buffer in net.named_buffers():
        if is_lazy(buffer):
            raise UsageError(f"{name}: the layer of {one} is lazy: call {name} on an image first")
        if buffer.layout != torch.strided:
            raise UsageError(
                f"{name}: the buffer {one} is sparse ({buffer.layout}), and cannot be kept over a "
                f"step that is skipped: make it dense with {one}.to_dense()"
            )
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1:
        raise UsageError(f"{name} is on {' and '.join(devices)}: move it to one of them")
    if not any(weight.requires_grad for weight in weights.values()):
        raise UsageError(
            f"{name} is frozen, so there is nothing to train: call {name}.requires_grad_(True), or "
            "leave it out"
        )


def logits_problem(
    net: nn.Module,
    x: Tensor,
    classes: int | None = None,
    *,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    all_used: bool = False,
) -> tuple[str, int]:
    """Let a network predict, and learn if ``train``, as the first step does, without a trace.

    Args:
        net: the network, in any mode.
        x: images [B, ...] on its device.
        classes: K; None for as many as it returns.
        train: predict in training mode, and go backward.
        dtype: of images and weights.
        autocast: the half precision to compute in, if any.
        all_used: whether every weight must get a gradient, as DDP demands.

    Returns:
        Why it does not fit, empty if it does; and the number of classes of its logits.
    """
    x = x.detach().to(dtype, copy=True)
    before, where = x._version, x.device.type
    with _without_a_trace(net), torch.enable_grad() if train else torch.no_grad():
        net.train(train)
        if dtype == torch.float64:
            net.double()
        # Before the forward pass, which may put other tensors in their places.
        weights = {name: one for name, one in net.named_parameters() if one.requires_grad}
        try:
            with torch.autocast(where, autocast, enabled=autocast is not None):
                logits = net(x)
            reason = _output_problem(logits, len(x), classes)
            if x._version != before:
                reason = "changes its images in place, which its peers see too: use x = x.clone()"
            if reason:
                return reason, 0
            found = int(logits.shape[1])
            if train:
                reason = _backward_problem(weights, logits, all_used)
            return reason, found
        except Exception as error:  # whatever a user's network raises
            return f"fails: {one_line(error) or type(error).__name__}", 0


def _output_problem(logits: Any, rows: int, classes: int | None) -> str:
    if not isinstance(logits, Tensor):
        return (
            f"returns a {type(logits).__name__}, not a tensor of logits: let it return these alone "
            "(aux_logits=False turns auxiliary outputs off)"
        )
    shape = list(logits.shape)
    if len(shape) != 2 or shape[0] != rows or (classes or shape[1]) != shape[1] or shape[1] < 2:
        return f"returns shape {shape}, not logits [{rows}, {classes or 'classes'}]"
    if not logits.is_floating_point():
        return f"returns logits of {logits.dtype}; they must be floating"
    if not logits.isfinite().all():
        return "returns logits that are not finite"
    return ""


def _backward_problem(weights: Mapping[str, Tensor], logits: Tensor, all_used: bool) -> str:
    if not logits.requires_grad:
        return "returns logits that carry no gradient to its weights"
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nn.functional.cross_entropy(
        wide, torch.zeros(len(wide), dtype=torch.int64).to(wide.device)
    ).backward()
    unused = [name for name, weight in weights.items() if weight.grad is None]
    if len(unused) == len(weights):
        return "returns logits that carry no gradient to its weights"
    if unused and all_used:
        return (
            f"does not use {unused[0]}, but with several processes every weight needs a gradient: "
            "freeze it with requires_grad_(False), or delete it"
        )
    return ""


# ---------------------------------------------------------------- without a trace

_CALLED = (types.FunctionType, types.MethodType, functools.partial)
_CONTAINERS = (dict, list, set, collections.deque, tuple)
_RANDOM = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


@contextlib.contextmanager
def _without_a_trace(net: nn.Module) -> Iterator[None]:
    """Put back at the end what a network and all that it holds were, and the random numbers.

    The network itself is tried, not a copy: a function that it holds would call the layers of the
    original. An object that is neither a module nor one of Python's containers is put back up to
    what its attributes hold.
    """
    held = _held(net)
    tensors = [one for one in held if isinstance(one, Tensor)]
    devices = {one.device for one in tensors if one.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with contextlib.ExitStack() as stack:
        stack.callback(np.random.set_state, numpy)
        stack.callback(random.setstate, python)
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        for one in held:
            stack.callback(_undoing(one))
        for tensor in tensors:
            if tensor.is_leaf:
                tensor.grad = None
                (tensor._post_accumulate_grad_hooks or {}).clear()  # such as an optimizer's step
        yield


def _held(net: nn.Module) -> list[Any]:
    """Return what can change of a network: modules, tensors, containers and generators."""
    found: dict[int, Any] = {}
    waiting: list[tuple[Any, bool]] = [(net, True)]
    while waiting:
        one, by_module = waiting.pop()
        if id(one) in found:
            continue
        parts: Iterable[Any] = ()
        if isinstance(one, nn.Module):
            parts, by_module = (vars(one), *_scripted(one).values()), True
        elif isinstance(one, Tensor):
            parts = [one._post_accumulate_grad_hooks] if one.is_leaf else ()
        elif isinstance(one, _CONTAINERS):
            parts = one.values() if isinstance(one, dict) else one
        elif isinstance(one, _CALLED):
            # Modules alone: what else a function uses is not the network's, and may be large.
            parts = [part for part in _uses(one) if isinstance(part, (nn.Module, *_CALLED))]
        elif by_module and _has_attributes(one):
            parts, by_module = [vars(one)], False
        elif not isinstance(one, _RANDOM + (np.ndarray,)):
            continue
        found[id(one)] = one
        waiting += [(part, by_module) for part in parts]
    return list(found.values())


def _has_attributes(one: Any) -> bool:
    other = (type, types.ModuleType, threading.Thread, *_RANDOM)
    return isinstance(getattr(one, "__dict__", None), dict) and not isinstance(one, other)


def _uses(function: Any) -> list[Any]:
    """Return what a function, a method or a partial function was made with."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, types.MethodType):
        return [function.__func__, function.__self__]
    cells = gc.get_referents(*function.__closure__ or ())  # ``cell_contents`` fails if it is empty
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _scripted(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that TorchScript holds, not Python, with parameters and buffers.

    A module that was loaded from a file lists only these two, and its mode.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return {}
    kind = vars(module).get("_concrete_type")
    names = {"training", *module._parameters.keys(), *module._buffers.keys()}
    names |= set(kind.get_attributes()) if kind else set()
    return {name: getattr(module, name) for name in sorted(names)}


def _undoing(one: Any) -> Callable[[], object]:
    """Return what puts something back to what it is now, without what it holds."""
    if isinstance(one, Tensor):
        return _undoing_tensor(one)
    if isinstance(one, torch.Generator):
        return functools.partial(one.set_state, one.get_state())
    if isinstance(one, random.Random):
        return functools.partial(one.setstate, one.getstate())
    if isinstance(one, np.random.RandomState):
        return functools.partial(one.set_state, one.get_state())
    if isinstance(one, np.random.Generator):
        return functools.partial(setattr, one.bit_generator, "state", one.bit_generator.state)
    if isinstance(one, np.ndarray):
        return functools.partial(np.copyto, one, one.copy()) if one.flags.writeable else _nothing
    if isinstance(one, nn.Module):
        scripted: Any = one
        before = _scripted(scripted)

        def undo() -> None:
            for name, value in before.items():
                scripted._c.setattr(name, value)

        return undo
    if isinstance(one, dict | set | list | collections.deque):
        return _undoing_container(one)
    return _nothing


def _nothing() -> None:
    pass


def _undoing_container(one: Any) -> Callable[[], object]:
    before = dict(one) if isinstance(one, dict) else list(one)
    marks = _marks(one)

    def undo() -> None:
        if _marks(one) != marks:  # some may be read only
            one.clear()
            (one.update if isinstance(one, dict | set) else one.extend)(before)

    return undo


def _marks(container: Any) -> list[int]:
    parts = container
    if isinstance(container, dict):
        parts = [part for pair in container.items() for part in pair]
    return [id(part) for part in parts]


def _undoing_tensor(one: Tensor) -> Callable[[], object]:
    if is_lazy(one):
        return _nothing
    data, leaf = one.data, one.is_leaf
    gradient, learns = one.grad if leaf else None, one.requires_grad
    whole = data
    if data.layout == torch.strided and data.numel():
        # The memory, because an expanded tensor cannot be written to.
        strides = zip(data.shape, data.stride(), strict=True)
        whole = data.as_strided((1 + sum((size - 1) * stride for size, stride in strides),), (1,))
    value = whole.clone()

    def undo() -> None:
        with torch.inference_mode(data.is_inference()):
            whole.copy_(value)
        if not data.is_inference():
            one.data = data
        if leaf:
            one.grad = None
            if one.requires_grad != learns:
                one.requires_grad_(learns)
            one.grad = gradient

    return undo
