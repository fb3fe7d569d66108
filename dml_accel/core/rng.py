"""Keyed randomness: every draw depends on its key only, so no random state is ever saved.

Two processes, two placements or a resumed run that use the same key get the same draws, whatever
was drawn before. Draws are made on the CPU, so that every device gets the same ones; they are
stable within one torch version, which config.json records.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def key(*parts: object) -> int:
    """Return a 63-bit seed for ``parts``, for instance ``key("weights", seed, peer_name)``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a fresh CPU generator keyed by ``parts``."""
    return torch.Generator().manual_seed(key(*parts))


@contextlib.contextmanager
def keeping_random_states() -> Iterator[None]:
    """Put back at the end the states that code of others draws from: torch (CPU), numpy, Python."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def seed_random_states(*parts: object) -> None:
    """Seed what code of others draws from by ``parts``; generators of accelerators are left alone.

    Call it within ``keeping_random_states``.
    """
    seed = key(*parts)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def stratified(labels: Tensor, count: int, *parts: object) -> Tensor:
    """Choose ``count`` rows stratified by class, keyed by ``parts``.

    Within each class, rows are shuffled and spread evenly over [0, 1); the rows with the smallest
    positions are chosen, so every class keeps its share to within one row.

    Args:
        labels: class of each row, shape [N], int64.
        count: rows to choose, 0 to N.
        parts: the key; without the run's seed, all seeds share the choice.

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
