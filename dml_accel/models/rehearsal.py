"""What a network does with a few images, tried before it is trained, without a trace in it.

Shape letters: B images, K classes.
"""

import contextlib
import copy
import random
from collections.abc import Iterator
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
    with _tried(net) as tried, torch.enable_grad() if train else torch.no_grad():
        tried.train(train)
        if dtype == torch.float64:
            tried.double()
        try:
            with torch.autocast(where, autocast, enabled=autocast is not None):
                logits = tried(x)
            reason = _output_problem(logits, len(x), classes)
            if x._version != before:
                reason = "changes its images in place, which its peers see too: use x = x.clone()"
            if reason:
                return reason, 0
            found = int(logits.shape[1])
            if train:
                reason = _backward_problem(tried, logits, all_used)
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


def _backward_problem(net: nn.Module, logits: Tensor, all_used: bool) -> str:
    if not logits.requires_grad:
        return "returns logits that carry no gradient to its weights"
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nn.functional.cross_entropy(
        wide, torch.zeros(len(wide), dtype=torch.int64).to(wide.device)
    ).backward()
    learns = {name: one for name, one in net.named_parameters() if one.requires_grad}
    unused = [name for name, weight in learns.items() if weight.grad is None]
    if len(unused) == len(learns):
        return "returns logits that carry no gradient to its weights"
    if unused and all_used:
        return (
            f"does not use {unused[0]}, but with several processes every weight needs a gradient: "
            "freeze it with requires_grad_(False), or delete it"
        )
    return ""


# ---------------------------------------------------------------- without a trace


@contextlib.contextmanager
def _tried(net: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of a network, or itself if it cannot be copied; then all is as it was before."""
    devices = {one.device for one in net.parameters() if one.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            copied = _copied(net)
            if copied is not None:
                copied.zero_grad()
                yield copied
            else:
                with _restoring(net):
                    yield net
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _copied(net: nn.Module) -> nn.Module | None:
    try:
        copied = copy.deepcopy(net)
    except Exception:  # locks, hooks, tensors with a history: whatever a user's network holds
        return None
    mine = {id(one) for one in (*net.modules(), *_tensors(net))}
    # A network can say how it is copied, and may say wrong.
    return None if mine & {id(one) for one in (*copied.modules(), *_tensors(copied))} else copied


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


@contextlib.contextmanager
def _restoring(net: nn.Module) -> Iterator[None]:
    """Put everything that a network holds back at the end, up to what its attributes hold."""
    owners = [vars(module) for module in net.modules()]
    owners += [owner[name] for owner in owners for name in ("_parameters", "_buffers", "_modules")]
    held = [(owner, dict(owner)) for owner in owners]
    tensors = [(one, one.data, one.detach().clone()) for one in _tensors(net)]
    gradients = [(one, one.grad) for one in net.parameters()]
    net.zero_grad()
    try:
        yield
    finally:
        for owner, before in held:
            owner.clear()
            owner.update(before)
        for tensor, data, value in tensors:
            data.copy_(value)
            tensor.data = data
        for weight, gradient in gradients:
            weight.grad = gradient
