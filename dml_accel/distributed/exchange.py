"""The exchange between processes of different peers: each receives the rows that it trains on.

The peers of one *team* are on the same processes, which cut every batch into slices of rows. A
*block* is the smallest set of processes whose slices cover the same rows in every team: where the
teams have equally many processes, one process of each. Nothing is sent between blocks, so that what
a process receives does not grow with the number of processes.

Shape letters: K peers of the cohort, k of them in this process, B rows of its slice.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dml_accel.data.batches import slices
from dml_accel.distributed.processes import Processes


@dataclass(frozen=True)
class Team:
    """Peers that are on the same processes.

    Attributes:
        ranks: of the processes, ascending.
        peers: their names, in name order.
    """

    ranks: tuple[int, ...]
    peers: tuple[str, ...]


def teams_of(ranks: Mapping[str, Iterable[int]]) -> list[Team]:
    """Return the teams by their first process, from the processes of each peer."""
    peers: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(ranks):
        peers.setdefault(tuple(ranks[name]), []).append(name)
    return [Team(held, tuple(names)) for held, names in sorted(peers.items())]


def blocks_of(teams: Sequence[Team]) -> list[tuple[int, ...]]:
    """Return the processes of each block, ascending.

    Teams of 2 and 4 processes have 2 blocks: one of 2 in each. Slices begin at rows ``i B // w``,
    so that teams of w processes have a cut in common wherever i / w is the same.
    """
    number = math.gcd(*(len(team.ranks) for team in teams))
    found: list[list[int]] = [[] for _ in range(number)]
    for team in teams:
        each = len(team.ranks) // number
        for block, first in zip(found, range(0, len(team.ranks), each), strict=True):
            block += team.ranks[first : first + each]
    return [tuple(sorted(block)) for block in found]


@dataclass(frozen=True)
class Overlap:
    """Rows that a process of another team has as well as we do.

    Attributes:
        rank: of that process.
        team: its place among the teams.
        first: the first of these rows, counted from our first one.
        end: one past the last.
    """

    rank: int
    team: int
    first: int
    end: int


def overlaps_of(teams: Sequence[Team], rank: int, count: int) -> list[Overlap]:
    """Return which rows of a batch of ``count`` rows a process shares with others, by rank."""
    cuts = {
        member: (place, *cut)
        for place, team in enumerate(teams)
        for member, cut in zip(team.ranks, slices(count, len(team.ranks)), strict=True)
    }
    ours, lo, hi = cuts[rank]
    found = [
        Overlap(member, team, max(lo, start) - lo, min(hi, stop) - lo)
        for member, (team, start, stop) in sorted(cuts.items())
        if team != ours
    ]
    return [one for one in found if one.first < one.end]


class Exchange:
    """The exchange of one process with those of other teams.

    Args:
        processes: of the run.
        teams: all of them; more than one.
    """

    def __init__(self, processes: Processes, teams: Sequence[Team]) -> None:
        self._teams, rank = teams, processes.rank
        self._ours = next(place for place, team in enumerate(teams) if rank in team.ranks)
        blocks = blocks_of(teams)
        self._block = next(block for block in blocks if rank in block)
        self._group = processes.group_in(blocks)
        # Whether all processes of a block have the same rows, and as many peers.
        self._same_rows = len(self._block) == len(teams)
        self._same_shape = self._same_rows and len({len(team.peers) for team in teams}) == 1
        # What is received comes team by team, and is wanted in name order.
        names = [name for team in teams for name in team.peers]
        order = [names.index(name) for name in sorted(names)]
        is_sorted = order == list(range(len(names)))
        self._order = None if is_sorted else torch.tensor(order, device=processes.device)
        self._overlaps = functools.cache(lambda count: overlaps_of(teams, rank, count))

    def logits(self, ours: Tensor, count: int) -> Tensor:
        """Return the logits of all peers for our rows, [K, B, C], in name order.

        Args:
            ours: of our peers, [k, B, C].
            count: rows of the whole micro-batch, over all slices.
        """
        if self._same_shape:
            found = ours.new_empty(len(self._teams), *ours.shape)
            if ours.numel():
                dist.all_gather(list(found), ours.contiguous(), group=self._group)
            found = found.flatten(0, 1)
        else:
            found = torch.cat(self._swap(ours, count, [len(team.peers) for team in self._teams]))
        return found if self._order is None else found[self._order]

    def sum(self, ours: Tensor, count: int) -> Tensor:
        """Add up what all teams have for our rows, [B, ...].

        Args:
            ours: the sum over our peers, [B, ...]; it may be overwritten.
            count: rows of the whole micro-batch, over all slices.
        """
        if not self._same_rows:
            return torch.cat(self._swap(ours[None], count, [1] * len(self._teams))).sum(0)
        if ours.numel():
            dist.all_reduce(ours, group=self._group)
        return ours

    def broadcast(self, peer: str, tensors: Iterable[Tensor]) -> None:
        """Give the processes of our block what a peer's first process among them has.

        Args:
            peer: its name.
            tensors: of equal shapes in all processes; overwritten in those of other peers.
        """
        team = next(team for team in self._teams if peer in team.peers)
        source = next(rank for rank in self._block if rank in team.ranks)
        for tensor in tensors:
            dist.broadcast(tensor, src=source, group=self._group)

    def _swap(self, ours: Tensor, count: int, peers: Sequence[int]) -> list[Tensor]:
        """Return what each team has for our rows, [its peers, B, ...].

        Args:
            ours: [our peers, B, ...].
            count: rows of the whole micro-batch.
            peers: how many of each team are sent.
        """
        overlaps, row = self._overlaps(count), ours.shape[2:]
        places = {rank: place for place, rank in enumerate(self._block)}
        sent, received = [0] * len(places), [0] * len(places)  # bytes
        for one in overlaps:
            size = (one.end - one.first) * row.numel() * ours.element_size()
            sent[places[one.rank]] = len(ours) * size
            received[places[one.rank]] = peers[one.team] * size
        pieces = [ours[:, one.first : one.end].flatten() for one in overlaps]
        # As bytes, because not every backend exchanges every dtype.
        outgoing = torch.cat([*pieces, ours.new_empty(0)]).view(torch.uint8)
        incoming = outgoing.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=self._group)
        parts = incoming.split(received)
        # Each team's slices in the order of its processes; none of them where we have no rows.
        found = [[ours.new_empty(number, 0, *row)] for number in peers]
        found[self._ours] = [ours]
        for one in overlaps:
            part = parts[places[one.rank]].view(ours.dtype)
            found[one.team].append(part.view(peers[one.team], -1, *row))
        return [torch.cat(pieces, dim=1) for pieces in found]
