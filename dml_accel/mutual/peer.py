"""A peer in training: its network, optimizer and loss scaler, and how it takes a step."""

import contextlib
from dataclasses import dataclass, field

import torch
from accelerate.utils.other import is_compiled_module
from torch import Tensor, nn

from dml_accel.models.optim import is_fused
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.averages import Average
from dml_accel.mutual.buffers import Buffers
from dml_accel.mutual.snapshots import Snapshot


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
        average: the average of its weights, with ``--ema``.
        snapshot: its weights at the last exchange, with ``--exchange-every``.
        best: with ``--keep best``, its weights at its best evaluation up to now, on the host.
        rates: learning rates of the groups of an optimizer of the caller's, which the rate of a
            step multiplies; empty where the rate of a step is that of all groups.
    """

    spec: PeerSpec
    module: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    keeps_gradients: bool = False
    average: Average | None = None
    snapshot: Snapshot | None = None
    best: dict[str, Tensor] | None = None
    rates: tuple[float, ...] = ()
    _buffers: Buffers = field(init=False)

    def __post_init__(self) -> None:
        self._buffers = Buffers(self.module, counts=not is_compiled_module(self.net))

    @property
    def name(self) -> str:
        """The peer's name, ``<net>-<index>``."""
        return self.spec.name

    def begin_step(self, lr: float) -> None:
        """Clear the gradients, set the learning rate, and copy the buffers.

        Args:
            lr: of all groups of parameters; or the factor of ``rates``.
        """
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if self.keeps_gradients:
            for weight in self.module.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.rates[index] * lr if self.rates else lr
        # A step that is skipped must leave no trace, but the forward pass moves running statistics
        # before anybody knows whether the loss is finite.
        self._buffers.begin_step()

    def forward(self, x: Tensor, dropout_key: int) -> Tensor:
        """Return logits [B, C] of images [B, 3, S, S], with a graph for the backward pass."""
        torch.manual_seed(dropout_key)
        with self._buffers.counting():
            return self.net(x)

    @torch.no_grad()
    def predict(self, x: Tensor, dropout_key: int) -> Tensor:
        """Return the same logits without a graph, by the bare network: DDP expects a backward."""
        torch.manual_seed(dropout_key)
        with self._buffers.counting():
            return self.module(x)

    def keeping_buffers(self) -> contextlib.AbstractContextManager[None]:
        """Restore the running statistics at the end, whatever is predicted within."""
        return self._buffers.keeping()

    def update(self, finite: Tensor, clip_norm: float | None) -> Tensor:
        """Take the optimizer's step; if ``finite`` is false, leave everything as it was.

        With a fused optimizer nothing is read back from the device: the condition is applied
        there. With another one the host reads ``finite``.

        Args:
            finite: whether the loss is finite, a bool on the device.
            clip_norm: largest norm of the gradient, or None.

        Returns:
            Whether the step was taken, a bool on the device: in fp16 a gradient may overflow
            although the loss is finite.
        """
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), clip_norm)
        taken = finite
        if self.scaler.is_enabled():
            # It finds the gradients of a loss that is not finite, which are not either.
            self.scaler.step(self.optimizer)
            (overflow,) = self.scaler._found_inf_per_device(self.optimizer).values()
            taken = overflow == 0
            self.scaler.update()
        elif is_fused(self.optimizer):
            # Fused optimizers read this before they touch anything, and skip the step if it is 1.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self._buffers.end_step(finite)
        return taken
