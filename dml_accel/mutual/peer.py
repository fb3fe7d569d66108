"""A peer in training: its network, optimizer and loss scaler, and how it takes a step."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dml_accel.models.spec import PeerSpec

_Buffers = list[tuple[list[Tensor], Tensor]]


@dataclass
class Peer:
    """A network that is trained, with what belongs to it alone.

    That includes a loss scaler: a scaler shared by several optimizers is updated by the first of
    them that steps, and the others then divide their gradients by the wrong scale.

    Attributes:
        spec: name, network and arguments.
        module: the bare network, whose parameters are saved.
        net: what is called in training: the module on its device, compiled or in DDP.
        optimizer: of the module's parameters.
        scaler: does nothing outside fp16.
        keeps_gradients: give gradients memory of their own, because the memory of a backward pass
            is reused by the next network's, as with CUDA graphs.
    """

    spec: PeerSpec
    module: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    keeps_gradients: bool = False
    _buffers: _Buffers = field(default_factory=list, init=False)

    @property
    def name(self) -> str:
        """The peer's name, ``<net>-<index>``."""
        return self.spec.name

    def begin_step(self, lr: float) -> None:
        """Clear the gradients, set the learning rate, and copy the buffers."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if self.keeps_gradients:
            for weight in self.module.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A step that is skipped must leave no trace, but the forward pass moves running statistics
        # before anybody knows whether the loss is finite.
        self._buffers = self._copy_buffers()

    def forward(self, x: Tensor, dropout_key: int) -> Tensor:
        """Return logits [B, C] of images [B, 3, S, S], with a graph for the backward pass."""
        torch.manual_seed(dropout_key)
        return self.net(x)

    @torch.no_grad()
    def predict(self, x: Tensor, dropout_key: int) -> Tensor:
        """Return the same logits without a graph, by the bare network: DDP expects a backward."""
        torch.manual_seed(dropout_key)
        return self.module(x)

    @contextlib.contextmanager
    def keeping_buffers(self) -> Iterator[None]:
        """Restore the running statistics at the end, whatever is predicted within."""
        copied = self._copy_buffers()
        yield
        for buffers, before in copied:
            _set(buffers, before)

    def update(self, finite: Tensor, clip_norm: float | None) -> None:
        """Take the optimizer's step; if ``finite`` is false, leave everything as it was.

        Nothing is read back from the device: the condition is applied there.

        Args:
            finite: whether the loss is finite, a bool on the device.
            clip_norm: largest norm of the gradient, or None.
        """
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), clip_norm)
        # Fused optimizers read this before they touch anything, and skip the step if it is 1.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for buffers, before in self._buffers:
            _set(buffers, torch.where(finite, _flat(buffers), before))

    def _copy_buffers(self) -> _Buffers:
        """Return buffers grouped by dtype, each group with a flat copy: few kernels, not many."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        return [(same, _flat(same)) for same in by_dtype.values()]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@torch.no_grad()
def _set(buffers: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([buffer.numel() for buffer in buffers])
    shaped = [p.view_as(b) for p, b in zip(parts, buffers, strict=True)]
    torch._foreach_copy_(buffers, shaped)
