"""The weights that peers teach with between two exchanges: ``--exchange-every``.

Codistillation (Anil et al. 2018, arXiv 1804.03235): every process keeps a copy of all peers as they
were at the last exchange, and predicts with the copies what its own peers learn. Between exchanges
no logit crosses between processes.

Shape letters: K peers of the cohort, B rows of our slice, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dml_accel.core.method import MethodConfig
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.averages import matches


@dataclass
class Snapshot:
    """The weights of one peer at the last exchange.

    Attributes:
        module: a copy of the bare network, which holds them.
        first: the optimizer step, from 0, before which the first exchange comes.
        is_taken: whether it holds those of an exchange.
    """

    module: nn.Module
    first: int
    is_taken: bool = False


class Snapshots:
    """The weights of all peers at the last exchange, in one process.

    Args:
        copies: a copy of every peer's network, by name, on the device and in evaluation mode.
        networks: the bare networks that are trained here, by name.
        placement: which peers are ours.
        method: when they are exchanged, and whether all peers have one target.

    Attributes:
        of: the snapshot of every peer, by name, in name order.
    """

    def __init__(
        self,
        copies: Mapping[str, nn.Module],
        networks: Mapping[str, nn.Module],
        placement: Placement,
        method: MethodConfig,
    ) -> None:
        self.of = {name: Snapshot(copies[name], method.burn_in) for name in placement.names}
        self._matches = {name: matches(copies[name], one) for name, one in networks.items()}
        self._placement = placement
        self._first, self._every = method.burn_in, method.exchange_every
        # A peer that is alone here learns from the others only, unless its target is that of all.
        alone = len(placement.mine) == 1 and not method.one_target.is_shared
        self._unused = placement.mine[0] if alone else None
        self._is_exchanged = False

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        """Exchange weights, if an exchange comes before this optimizer step, counted from 0.

        All processes call this before every step. In the first step of a resumed run they exchange
        the snapshots that were loaded, not the weights.
        """
        after = step - self._first
        if after < 0:
            return
        if after % self._every == 0:
            for found in self._matches.values():
                theirs = [one.owner[one.name] for one in found]
                torch._foreach_copy_([one.ours for one in found], theirs)
            self._exchange()
        elif not self._is_exchanged:
            self._exchange()

    def _exchange(self) -> None:
        """Give every process what the processes of each peer have."""
        for name, snapshot in self.of.items():
            if not self._placement.holds_all:
                self._broadcast(name, snapshot.module)
            snapshot.is_taken = True
        self._is_exchanged = True

    def _broadcast(self, name: str, module: nn.Module) -> None:
        for tensors in _by_dtype(module):
            # One broadcast for all of them; as bytes, because not every backend sends every dtype.
            flat = torch.cat([one.flatten() for one in tensors])
            self._placement.broadcast(name, [flat.view(torch.uint8)])
            if name not in self._matches:
                parts = flat.split([one.numel() for one in tensors])
                shaped = [part.view(one.shape) for part, one in zip(parts, tensors, strict=True)]
                torch._foreach_copy_(tensors, shaped)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the logits of all peers for images [B, 3, S, S], in evaluation mode, [K, B, C].

        Those of a peer that is alone here are 0: it does not learn from itself.
        """
        found = {
            name: snapshot.module(x) for name, snapshot in self.of.items() if name != self._unused
        }
        if self._unused is not None:
            found[self._unused] = torch.zeros_like(next(iter(found.values())))
        return torch.stack([found[name] for name in self.of])


def _by_dtype(module: nn.Module) -> list[list[Tensor]]:
    """Return parameters and buffers, a list for each dtype; those that modules share come once."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for one in (*module.parameters(), *module.buffers()):
        groups.setdefault(one.dtype, []).append(one)
    return list(groups.values())
