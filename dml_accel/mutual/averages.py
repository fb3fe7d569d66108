"""The average of a peer's weights over its steps: ``--ema``.

An exponential moving average, as timm's ``ModelEmaV3`` keeps it: of the parameters and of the
floating buffers, such as running statistics; other buffers are copied. Unlike timm's, it leaves out
a skipped step without waiting for the device.
"""

import copy
import itertools
from collections.abc import Mapping
from typing import NamedTuple

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
            f"--ema and --exchange-every keep weights of {name} in a copy, but it cannot be "
            f"copied: {one_line(error)}"
        ) from error


def refuse_uncopied(modules: Mapping[str, nn.Module]) -> None:
    """Refuse networks, by name, that cannot be copied, before anything is written.

    Raises:
        UsageError: see ``copy_of``.
    """
    for name, module in modules.items():
        copy_of(module, name)


class Match(NamedTuple):
    """A tensor of a copy, and where the network has its own.

    Attributes:
        path: its name in the network.
        ours: the copy's.
        owner: parameters or buffers of a module of the network, by name.
        name: there.
    """

    path: str
    ours: Tensor
    owner: dict[str, Tensor]
    name: str


def matches(module: nn.Module, network: nn.Module) -> list[Match]:
    """Return parameters and buffers of a copy of a network, those that modules share once.

    The network's own has to be looked up whenever it is read, because a network may replace a
    buffer. Buffers that it has got after the copy was made are not among them.
    """
    found = []
    for path, ours, kind in (
        *((*one, "_parameters") for one in module.named_parameters()),
        *((*one, "_buffers") for one in module.named_buffers()),
    ):
        parent, _, name = path.rpartition(".")
        found.append(Match(path, ours, getattr(network.get_submodule(parent), kind), name))
    return found


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
        self._groups: dict[torch.dtype | None, _Group] = {}
        for one in matches(module, network):
            # What is not saved is not trained: a constant, perhaps with infinities.
            averaged = one.ours.is_floating_point() and one.path in saved
            group = self._groups.setdefault(one.ours.dtype if averaged else None, _Group())
            group.ours.append(one.ours)
            group.theirs.append((one.owner, one.name))
        for dtype, group in self._groups.items():
            if dtype is not None:
                group.make_room()

    @torch.no_grad()
    def update(self, taken: Tensor, step: int) -> None:
        """Move the average towards the network's weights as they are after a step.

        A value stays as it is where it or the network's is not finite.

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
            torch._foreach_copy_(group.moves, values)
            torch._foreach_sub_(group.moves, group.ours)
            # Before it is multiplied: 0 times NaN is NaN, and so is infinity minus infinity.
            group.all_moves.nan_to_num_(0.0, 0.0, 0.0).mul_(taken.to(dtype) * share)
            torch._foreach_add_(group.ours, group.moves)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, 3, S, S], in evaluation mode."""
        return self.module(x)


class _Group:
    """Tensors of one dtype that are averaged, or those that are copied, and where theirs are."""

    def __init__(self) -> None:
        self.ours: list[Tensor] = []
        self.theirs: list[tuple[dict[str, Tensor], str]] = []

    def make_room(self) -> None:
        """Allocate differences of theirs from ours: views of one tensor, which one kernel reads."""
        sizes = [one.numel() for one in self.ours]
        self.all_moves = self.ours[0].new_zeros(sum(sizes))
        starts = itertools.accumulate(sizes, initial=0)
        # Laid out as ours are, because other strides would take a kernel for each of them.
        self.moves = [
            self.all_moves.as_strided(one.shape, torch.empty_like(one).stride(), start)
            for one, start in zip(self.ours, starts, strict=False)
        ]
