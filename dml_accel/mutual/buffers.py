"""The buffers of a network over a step, in few operations whatever its number of layers.

A step that is skipped must leave no trace, but the forward pass moves running statistics before
anybody knows whether the loss is finite. So they are copied before each step, and put back if it is
skipped. Nothing is read back from the device.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dml_accel.distributed.batchnorm import GroupBatchNorm2d, GroupBatchNormAct2d

_COUNTER = "num_batches_tracked"
# Layers that do nothing with their counter in a forward pass but to add 1.
_COUNTING = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d}
_COUNTING |= {GroupBatchNorm2d, GroupBatchNormAct2d}


class Buffers:
    """Copies and restores the buffers of a network.

    The buffers stay where they are, each in memory of its own: views of one tensor would save two
    operations, but users could not save such a network, and compilers handle it badly.

    Args:
        module: the bare network, on its device.
        counts: whether to count the forward passes of batch norms for all layers at once; a
            compiled network adds to its own counters.
    """

    def __init__(self, module: nn.Module, *, counts: bool) -> None:
        self._owners: list[dict[str, Any]] = [owner._buffers for owner in module.modules()]
        # Without a momentum, a layer divides by its counter.
        layers = [one for one in module.modules() if type(one) in _COUNTING and one.momentum]
        found: list[dict[str, Any]] = [layer._buffers for layer in layers if counts]
        self._counting = [owner for owner in found if owner[_COUNTER] is not None]
        self._groups: list[_Group] = []

    def begin_step(self) -> None:
        """Copy the buffers."""
        for group in self._current():
            group.before.take(group.tensors)

    def end_step(self, finite: Tensor) -> None:
        """Put back what ``begin_step`` has copied unless ``finite``, a bool on the device."""
        for group in self._groups:
            group.after.take(group.tensors)
            torch.where(finite, group.after.flat, group.before.flat, out=group.after.flat)
            group.after.put(group.tensors)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Put back at the end of the context what the buffers were before it."""
        groups = self._current()
        for group in groups:
            group.after.take(group.tensors)
        try:
            yield
        finally:
            for group in groups:
                group.after.put(group.tensors)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Add to the counters of all batch norms at once what is counted within the context."""
        counters = [owner[_COUNTER] for owner in self._counting]
        counts = [_Count() for _ in counters]
        for owner, count in zip(self._counting, counts, strict=True):
            owner[_COUNTER] = count
        try:
            yield
        finally:
            for owner, counter in zip(self._counting, counters, strict=True):
                owner[_COUNTER] = counter
        if counters:
            torch._foreach_add_(counters, [count.value for count in counts])

    def _current(self) -> "list[_Group]":
        """Return the buffers, grouped by dtype."""
        # By identity: modules may share a buffer.
        found = {id(t): t for owner in self._owners for t in owner.values() if t is not None}
        known = {id(t): t for group in self._groups for t in group.tensors}
        if found.keys() != known.keys():  # at first, and after the network was moved
            dtypes = dict.fromkeys(t.dtype for t in found.values())
            self._groups = [
                _Group([t for t in found.values() if t.dtype == dtype]) for dtype in dtypes
            ]
        return self._groups


class _Count:
    """Stands in for a counter during a forward pass: a number of the host."""

    value = 0

    def add_(self, more: int) -> None:
        self.value += more


class _Group:
    """Buffers of one dtype, and memory for two copies of them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.before, self.after = _Copy(tensors), _Copy(tensors)


class _Copy:
    """A flat copy of tensors, in memory that is kept: ``flat`` [all elements]."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        self.flat = tensors[0].new_empty(sum(sizes))
        pieces = self.flat.split(sizes)
        self._parts = [a.view_as(b) for a, b in zip(pieces, tensors, strict=True)]

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(self._parts, tensors)

    @torch.no_grad()
    def put(self, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(tensors, self._parts)
