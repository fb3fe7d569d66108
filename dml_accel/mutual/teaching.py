"""Who teaches whom, and what: one object that every update schedule asks.

Shape letters: K peers that learn, F that only teach, B rows of a batch, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dml_accel.core.config import Config
from dml_accel.mutual.links import Weights
from dml_accel.mutual.losses import Targets, at_least_single, lessons, targets


class Teaching:
    """What the peers of a run are taught.

    Args:
        config: target, temperature, KL weight and what of the logits is exchanged.
        peers: names of those that learn, in the order of the command line, which is the order in
            which they take turns.
        frozen: names of those that only teach.
        links: ``links.read``'s; None where all teach all alike.

    Attributes:
        is_on: whether there is a KL term at all; at weight 0 it is not computed.
    """

    def __init__(
        self,
        config: Config,
        peers: Sequence[str],
        frozen: Sequence[str] = (),
        links: Weights | None = None,
    ) -> None:
        self.turns, names = list(peers), sorted(peers)
        self.is_on = config.kl_weight > 0 and len(names) + len(frozen) > 1
        self._weight, self._warmup = config.kl_weight, config.kl_warmup
        self._target, self._temperature = config.target, config.temperature
        self.exchange_dtype = torch.bfloat16 if config.exchange_dtype == "bf16" else None
        self._teachers = [*names, *frozen]
        self._links: Tensor | None = None
        if links is not None:
            rows = [[links[k].get(teacher, 0.0) for teacher in self._teachers] for k in names]
            self._links = torch.tensor(rows, dtype=torch.float64)

    @property
    def takes_each_alone(self) -> bool:
        """Whether the sum over all peers is not enough, because they weigh differently."""
        return self._links is not None

    def weight(self, step: int, steps_per_epoch: int) -> float:
        """The weight of the KL term in optimizer step ``step`` (from 0): never 0 in the warm-up."""
        steps = self._warmup * steps_per_epoch
        return self._weight * min(1.0, (step + 1) / steps) if steps else self._weight

    def teachers_of(self, peer: str) -> list[str]:
        """Return the names of those that a peer learns from, in name order, frozen ones last."""
        if not self.is_on:
            return []
        if self._links is None:
            return [name for name in self._teachers if name != peer]
        row = self._links[sorted(self.turns).index(peer)].tolist()
        return [name for name, weight in zip(self._teachers, row, strict=True) if weight > 0]

    def rounded(self, logits: Tensor) -> Tensor:
        """Return logits as they teach, under every placement: in single precision at least."""
        logits = at_least_single(logits.detach())
        if self.exchange_dtype is None:
            return logits
        return logits.to(self.exchange_dtype).to(logits.dtype)

    def lessons(self, logits: Tensor) -> Tensor:
        """Return what peers with these logits teach, [K, B, C + 2]; see ``losses.lessons``."""
        return lessons(logits, self._temperature, self._target)

    def from_the_others(self, everyone: Tensor, own: Tensor) -> Targets:
        """Return what peers learn from all others.

        Args:
            everyone: sum of all lessons, [B, C + 2].
            own: these peers' own part of it, [K, B, C + 2].
        """
        return targets(everyone - own, self._target)

    def by_links(self, lessons_LBC: Tensor, rows: Sequence[int]) -> Targets:
        """Return what peers learn over their links.

        Args:
            lessons_LBC: of all L = K + F that learn, in name order, and that only teach,
                [L, B, C + 2].
            rows: places in name order of the peers that are taught.
        """
        assert self._links is not None, "links are what this is for"
        self._links = self._links.to(lessons_LBC)  # once: the same device and precision from then
        links = self._links[list(rows)]
        return targets(torch.einsum("kl,lbc->kbc", links, lessons_LBC), self._target)
