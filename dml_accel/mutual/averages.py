"""The average of a peer's weights over its steps: ``--ema``.

An exponential moving average, as timm's ``ModelEmaV3`` keeps it: of the parameters and of the
floating buffers, such as running statistics; other buffers are copied. Unlike timm's, it leaves out
a skipped step without waiting for the device.
"""

import copy

import torch
from torch import Tensor, nn

from dml_accel.core.errors import UsageError, one_line


def average_decay(highest: float, step: int) -> float:
    """Return the decay of optimizer step ``step``, counted from 0.

    Smaller at first, so that the average of a short run is not that of its untrained weights; and a
    function of the step alone, so that a resumed run needs no more than its step.
    """
    return min(highest, (1 + step) / (10 + step))


def copy_of(module: nn.Module, name: str) -> nn.Module:
    """Return a copy of a bare network that is neither trained nor in training mode.

    Raises:
        UsageError: it cannot be copied.
    """
    try:
        return copy.deepcopy(module).requires_grad_(False).eval()
    except Exception as error:  # networks of users raise their own kinds
        raise UsageError(
            f"--ema averages the weights of {name} in a copy, but it cannot be copied: "
            f"{one_line(error)}"
        ) from error


class Average:
    """The average of the weights of one network.

    Args:
        module: a copy of the network, on the same device; it holds the average.
        network: the bare network that is trained.
        decay: the highest decay.

    Attributes:
        module: see above.
    """

    def __init__(self, module: nn.Module, network: nn.Module, decay: float) -> None:
        self.module, self._decay = module, decay
        saved = module.state_dict(keep_vars=True).keys()
        # Each tensor once, however many modules share it; the network's own is looked up in every
        # step, because a network may replace a buffer.
        owners = [
            *((name, "_parameters") for name, _ in module.named_parameters()),
            *((name, "_buffers") for name, _ in module.named_buffers()),
        ]
        self._groups: dict[torch.dtype | None, _Group] = {}
        for path, kind in owners:
            parent, _, name = path.rpartition(".")
            ours = getattr(module.get_submodule(parent), kind)[name]
            theirs = getattr(network.get_submodule(parent), kind)
            # What is not saved is not trained: a constant, perhaps with infinities.
            averaged = ours.is_floating_point() and path in saved
            group = self._groups.setdefault(ours.dtype if averaged else None, _Group())
            group.ours.append(ours)
            group.theirs.append((theirs, name))

    @torch.no_grad()
    def update(self, taken: Tensor, step: int) -> None:
        """Move the average towards the network's weights as they are after a step.

        Args:
            taken: whether the network has taken the step, a bool on the device; else the average
                stays as it is.
            step: the number of the optimizer step, from 0.
        """
        share = 1 - average_decay(self._decay, step)
        for dtype, group in self._groups.items():
            values = [owner[name] for owner, name in group.theirs]
            if dtype is None:
                torch._foreach_copy_(group.ours, values)
                continue
            moves = torch._foreach_sub(values, group.ours)
            torch._foreach_mul_(moves, taken.to(dtype) * share)
            torch._foreach_add_(group.ours, moves)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, 3, S, S], in evaluation mode."""
        return self.module(x)


class _Group:
    """Tensors of one dtype that are averaged, or those that are copied, and where theirs are."""

    def __init__(self) -> None:
        self.ours: list[Tensor] = []
        self.theirs: list[tuple[dict[str, Tensor], str]] = []
