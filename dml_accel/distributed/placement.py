"""Which processes train which peer: the map, and the collectives that follow from it.

The processes of a peer cut each batch into consecutive slices of rows; gradients are averaged among
them, so that the peer takes the step that a single process would. ``replicate`` maps every peer to
every process. Under ``split`` peers are on different processes, and what they learn from each
other crosses between processes (``exchange``): the logits of the rows that both compute, or a sum
of posteriors.

Shape letters: K peers of the cohort, k of them in this process, B rows of its slice, C classes.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_accel.data.batches import slices
from dml_accel.distributed.exchange import Exchange, teams_of
from dml_accel.distributed.processes import Processes


class Placement:
    """The map from peers to processes, seen from one process.

    Args:
        processes: those that share the work.
        ranks: the processes of each peer, ascending and consecutive. Peers that share one process
            share all of theirs.
        batch_norm: ``group`` or ``local``.

    Attributes:
        device: of this process's networks and batches.
        names: all peers, in name order.
        mine: the peers that are trained here, in name order.
        index: which slice of a batch is ours.
        kind: ``replicate`` or ``split``, as in results.json.
        group: the process group of our peers; None for all processes.
        spans_batch_norm: whether batch statistics of our peers span several processes.
    """

    def __init__(
        self,
        processes: Processes,
        ranks: Mapping[str, Sequence[int]],
        batch_norm: str = "group",
    ) -> None:
        self.processes, self.device = processes, processes.device
        self.ranks = {name: list(held) for name, held in ranks.items()}
        # Name order everywhere: sums over peers then do not depend on the order of the cohort.
        self.names = sorted(self.ranks)
        whole = list(range(processes.world_size))
        self.mine = [name for name in self.names if processes.rank in self.ranks[name]]
        self._members = self.ranks[self.mine[0]]
        self.index = self._members.index(processes.rank)
        replicated = all(held == whole for held in self.ranks.values())
        self.kind = "replicate" if replicated else "split"
        teams = teams_of(self.ranks)
        # All processes create the same groups in this order, each those that it is in.
        self.group = processes.group_in([team.ranks for team in teams])
        self._exchange = Exchange(processes, teams) if len(teams) > 1 else None
        self._widest = max(len(held) for held in self.ranks.values())
        self.spans_batch_norm = batch_norm == "group" and len(self._members) > 1
        # On the device once: a list as an index would be copied there, and waited for, every step.
        places = [self.names.index(name) for name in self.mine]
        self._places = torch.tensor(places, device=self.device)

    # ------------------------------------------------------------ the map

    @property
    def is_alone(self) -> bool:
        """Whether our peers are trained by this process only."""
        return len(self._members) == 1

    @property
    def holds_all(self) -> bool:
        """Whether this process trains every peer."""
        return len(self.mine) == len(self.names)

    def leads(self, name: str) -> bool:
        """Whether this process writes the files of a peer."""
        return self.ranks[name][0] == self.processes.rank

    def rows(self, count: int) -> tuple[int, int]:
        """Return the first and one past the last of our rows among ``count`` rows."""
        return slices(count, len(self._members))[self.index]

    @property
    def slices(self) -> int:
        """How many slices a batch is cut into, at most."""
        return self._widest

    @property
    def gradient_scale(self) -> int:
        """The factor of a sum over our rows, because DDP divides gradients by the processes."""
        return len(self._members)

    @property
    def counts_rows(self) -> bool:
        """Whether this process counts the metrics of our rows: exactly one of all copies does."""
        return self.mine[0] == self.names[0]

    # ------------------------------------------------------------ the collectives

    @contextlib.contextmanager
    def micro_batch(self, nets: Sequence[nn.Module], last: bool) -> Iterator[None]:
        """Surround forward and backward of a micro-batch; gradients are averaged in the last."""
        # Without no_sync, DDP would average after each micro-batch: the same result, N times sent.
        with contextlib.ExitStack() as stack:
            for net in nets:
                if isinstance(net, DistributedDataParallel) and not last:
                    stack.enter_context(net.no_sync())
            yield

    def gather(self, logits: Tensor, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the logits of all peers for our rows, [K, B, C], in name order.

        Args:
            logits: of our peers for our rows, [k, B, C].
            count: rows of the whole micro-batch, over all slices.
            dtype: what is sent (default: that of the logits).
        """
        if self._exchange is None:
            return logits
        self.processes.comes_to_collective()
        return self._exchange.logits(logits.to(dtype or logits.dtype), count).to(logits.dtype)

    def sum_over_peers(self, ours: Tensor, count: int) -> Tensor:
        """Add up what all peers have for our rows, [B, ...].

        Args:
            ours: of our peers for our rows, [k, B, ...].
            count: rows of the whole micro-batch, over all slices.
        """
        total = ours.sum(0)
        if self._exchange is None:
            return total
        self.processes.comes_to_collective()
        return self._exchange.sum(total, count)

    def broadcast(self, peer: str, tensors: Iterable[Tensor]) -> None:
        """Give every process what the first of a peer's processes in its block has.

        Args:
            peer: its name.
            tensors: of equal shapes in all processes; overwritten in those of other peers.
        """
        if self._exchange is not None:
            self.processes.comes_to_collective()
            self._exchange.broadcast(peer, tensors)

    def sum_over_rows(self, sums: Tensor) -> Tensor:
        """Add up sums over rows of all processes, in place."""
        if self.processes.world_size > 1:
            self.processes.comes_to_collective()
            dist.all_reduce(sums)
        return sums

    def union(self, names: Iterable[str]) -> list[str]:
        """Return the peers that any process names, in name order."""
        # As numbers in a tensor: object collectives would unpickle what they receive.
        ours = set(names)
        word = torch.tensor([float(name in ours) for name in self.names], device=self.device)
        found = self.sum_over_rows(word).tolist()
        return [name for name, count in zip(self.names, found, strict=True) if count]

    def end_of_step(self, ours: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        """Add up over all processes, in one collective, what each step ends with.

        Args:
            ours: sums over our rows of our peers' losses, [k, P].
            requests: 1 for what this process requests, else 0, [R].

        Returns:
            Sums over all rows of all peers' losses, [K, P], and how many processes have each
            request, [R].
        """
        if self.processes.world_size == 1:
            return ours, requests
        self.processes.comes_to_collective()
        # Zeros for the peers of other processes: the sum then holds every peer once.
        losses = ours.new_zeros(len(self.names), ours.shape[1])  # [K, P]
        losses.index_copy_(0, self._places, ours)
        both = torch.cat([losses.flatten(), requests.to(losses, non_blocking=True)])
        dist.all_reduce(both)
        return both[: losses.numel()].view_as(losses), both[losses.numel() :]

    def broadcast_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Give all processes of a peer the running statistics of its first one.

        Those are evaluated and saved. Batch norms that span the processes are equal in any case.
        """
        if len(self._members) > 1 and not self.spans_batch_norm:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=self._members[0], group=self.group)
