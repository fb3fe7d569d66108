"""Which processes train which peer, so that the slowest is as fast as it can be."""

from collections.abc import Iterable, Mapping


def everywhere(peers: Iterable[str], world_size: int) -> dict[str, list[int]]:
    """Return the map of every peer to all processes."""
    return {name: list(range(world_size)) for name in peers}


def allocate(costs: Mapping[str, float], world_size: int) -> dict[str, list[int]]:
    """Return the processes of each peer: consecutive, in name order, each used by someone.

    With at least as many processes as peers, each next process goes to the peer whose share is
    the most costly, which minimises the largest share. With fewer, several peers share a process:
    the costliest peer first, each to the process that has least to do.

    Args:
        costs: of one step of each peer on one process, in any unit.
        world_size: processes.
    """
    names = sorted(costs)
    if world_size < len(names):
        return _shared(costs, names, world_size)
    count = dict.fromkeys(names, 1)
    for _ in range(world_size - len(names)):
        count[max(names, key=lambda name: costs[name] / count[name])] += 1
    ranks, first = {}, 0
    for name in names:
        ranks[name] = list(range(first, first + count[name]))
        first += count[name]
    return ranks


def _shared(costs: Mapping[str, float], names: list[str], world_size: int) -> dict[str, list[int]]:
    load = [0.0] * world_size
    held: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(names, key=lambda name: -costs[name]):  # stable: ties in name order
        # An empty process first, so that none is left without a peer.
        rank = min(range(world_size), key=lambda rank: (bool(held[rank]), load[rank]))
        held[rank].append(name)
        load[rank] += costs[name]
    return {name: [rank] for name in names for rank in range(world_size) if name in held[rank]}
