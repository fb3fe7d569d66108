"""Keyed randomness: every draw is a function of what it is for, so nothing random is carried.

Two processes, two placements or a resumed run that ask for the same key get the same draws,
whatever was drawn before. Draws are made on the CPU, so that every device sees the same ones;
they are stable within one torch version, which config.json records.
"""

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def key(*parts: object) -> int:
    """Return a 63-bit seed for ``parts``, for instance ``key("weights", seed, peer_name)``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a fresh CPU generator keyed by ``parts``."""
    return torch.Generator().manual_seed(key(*parts))


def stratified(labels: Tensor, count: int, *parts: object) -> Tensor:
    """Choose ``count`` rows with every class in proportion, keyed by ``parts``.

    Within each class the rows are shuffled and spread evenly over [0, 1); the rows with the
    smallest positions are taken, so class shares are kept to within one image.

    Args:
        labels: class of each row, shape [N], int64.
        count: rows to choose, 0 to N.
        parts: the key; never the run's seed, so that seeds share the choice.

    Returns:
        The chosen rows in ascending order, shape [count], int64.
    """
    shuffled = torch.randperm(len(labels), generator=generator(*parts))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    sizes = torch.bincount(labels).tolist()
    place = torch.cat([_spread(size) for size in sizes if size])
    return by_class[torch.argsort(place, stable=True)[:count]].sort().values


def _spread(size: int) -> Tensor:
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def bounds(rows: int, parts: int) -> Sequence[tuple[int, int]]:
    """Cut ``rows`` rows into ``parts`` consecutive slices whose sizes differ by at most one."""
    cuts = [rows * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(cuts))
