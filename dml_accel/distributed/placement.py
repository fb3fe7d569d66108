"""Where the work of a cohort is done: a map from each peer to the processes that train it.

The processes of a peer cut each batch into consecutive rows, one slice each; gradients are
averaged among them, so that the peer takes the step of one process. ``replicate`` is the map of
every peer to every process. Under ``split`` the peers are apart, and what they teach each other
crosses between processes: the logits of the rows that both compute, or the sum of posteriors.
Sums over peers run in name order.

Shape letters: K peers of the cohort, k of them here, B our rows of a batch, C classes.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_accel.core.config import Config
from dml_accel.core.rng import bounds
from dml_accel.data.batches import lay_weights, memory_format
from dml_accel.distributed.batchnorm import span_group
from dml_accel.distributed.compile import switched, tried
from dml_accel.distributed.processes import Processes
from dml_accel.mutual.losses import Targets
from dml_accel.mutual.teaching import Teaching

# torch 2.15 gave the argument a new name.
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False
}


class Placement:
    """The map, seen from one process.

    Args:
        config: the run's.
        processes: those that share the work.
        ranks: the processes of each peer, ascending and consecutive. Peers that share a process
            share all of theirs.

    Attributes:
        device: where this process's networks and batches are.
        names: all peers, in name order.
        mine: those trained here, in name order.
        index: which slice of a batch is ours.
        kind: ``replicate`` or ``split``, as in results.json.
    """

    def __init__(
        self, config: Config, processes: Processes, ranks: Mapping[str, Sequence[int]]
    ) -> None:
        self.processes, self.device = processes, processes.device
        self.ranks = {name: list(held) for name, held in ranks.items()}
        self.names = sorted(self.ranks)
        whole = list(range(processes.world_size))
        self._held = [[name for name in self.names if rank in self.ranks[name]] for rank in whole]
        self.mine = self._held[processes.rank]
        self._members = self.ranks[self.mine[0]]
        self.index = self._members.index(processes.rank)
        replicated = all(held == whole for held in self.ranks.values())
        self.kind = "replicate" if replicated else "split"
        # Every process makes every group, in the same order.
        everyone = sorted({tuple(held) for held in self.ranks.values()})
        groups = {members: processes.group(members) for members in everyone}
        self._group = groups[tuple(self._members)]
        widths = [len(held) for held in self.ranks.values()]
        self._narrowest, self._widest = min(widths), max(widths)
        self._spans_batch_norm = config.batch_norm == "group" and len(self._members) > 1
        self._config = config

    def prepare(self, module: nn.Module, name: str = "", compiled: bool = False) -> nn.Module:
        """Move one of our networks to the device, in place, and wrap it for training.

        Args:
            module: the bare network; its batch norms span the peer's processes afterwards,
                unless the configuration says ``local``.
            name: of the peer.
            compiled: whether to compile it; where that fails, it is said and the eager network
                taken. Not for a peer of several processes.

        Returns:
            What to call in training.
        """
        if self._spans_batch_norm:
            span_group(module, self._group)
        lay_weights(module, memory_format(self._config, self.device))
        accelerator = self.processes.accelerator
        with switched(accelerator, compiled and self.is_alone, self._config.compile_mode):
            net = accelerator.prepare_model(module, evaluation_mode=True)
        if self.is_alone:
            return tried(net, name, self._settle)
        # Buffers need no broadcast before each step: training never reads running statistics.
        net = DistributedDataParallel(
            net,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            process_group=self._group,
            **_NO_BUFFERS,
        )
        self._settle(net)
        return net

    @property
    def is_alone(self) -> bool:
        """Whether no other process trains the peers that are trained here."""
        return len(self._members) == 1

    def _settle(self, net: nn.Module) -> None:
        """Take a backward pass without effect for each length of a part of a batch.

        It compiles what is to be. After its first, DDP rearranges its buckets and so the order of
        its sums: a run that goes on from a checkpoint would take that pass at another step than one
        that was never stopped.
        """
        config = self._config
        parts = bounds(config.batch_size, config.grad_accum)
        before = [buffer.clone() for buffer in net.buffers()]
        like = next(net.parameters())
        try:
            # Lengths of whole parts: all processes of the peer take the same number of passes.
            for length in sorted({stop - start for start, stop in parts}):
                lo, hi = self.rows(length)
                images = like.new_zeros(hi - lo, 3, config.image_size, config.image_size)
                images = images.to(memory_format=memory_format(config, self.device))
                net(images).sum().backward()
                net.zero_grad()
        finally:  # what fails to compile runs eagerly, from where it was
            net.zero_grad()
            with torch.no_grad():
                for buffer, value in zip(net.buffers(), before, strict=True):
                    buffer.copy_(value)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler for one peer; outside fp16 it does nothing."""
        return torch.amp.GradScaler(
            self.device.type, enabled=self.processes.mixed_precision == "fp16"
        )

    def rows(self, count: int) -> tuple[int, int]:
        """Return the first and one past the last of the ``count`` rows that are ours."""
        return bounds(count, len(self._members))[self.index]

    def leads(self, name: str) -> bool:
        """Whether this process writes what is kept of a peer."""
        return self.ranks[name][0] == self.processes.rank

    @property
    def slices(self) -> int:
        """Into how many slices, at most, a batch is cut."""
        return self._widest

    @property
    def gradient_scale(self) -> int:
        """What a sum over our rows is multiplied by, as gradients are divided by the processes."""
        return len(self._members)

    @property
    def counts_rows(self) -> bool:
        """Whether metrics of all peers over our rows are ours to count: once among all slices."""
        return self.mine[0] == self.names[0]

    @contextlib.contextmanager
    def micro_batch(self, nets: Sequence[nn.Module], last: bool) -> Iterator[None]:
        """Surround forward and backward of one part of a batch; gradients meet in the last."""
        with contextlib.ExitStack() as stack:
            for net in nets:
                if isinstance(net, DistributedDataParallel) and not last:
                    stack.enter_context(net.no_sync())
            yield

    def targets(
        self, logits: Tensor, count: int, teaching: Teaching, frozen: Tensor | None = None
    ) -> Targets:
        """Return what our peers are taught.

        Args:
            logits: of our peers for our rows, [k, B, C].
            count: rows of the whole part of the batch.
            teaching: who learns what from whom.
            frozen: lessons of those that only teach, for our rows, [F, B, C + 2].
        """
        logits = teaching.rounded(logits)
        own, all_here = teaching.lessons(logits), len(self.mine) == len(self.names)
        if not all_here and self._config.exchange == "sum":
            lo, hi = self.rows(count)
            whole = own.new_zeros(count, own.shape[-1])
            whole[lo:hi] = own.sum(0)
            dist.all_reduce(whole)
            everyone = whole[None, lo:hi]
        elif all_here:
            everyone = own
        else:
            everyone = teaching.lessons(self.gather(logits, count, teaching.exchange_dtype))
        if frozen is not None:
            everyone = torch.cat([everyone, frozen])
        if teaching.takes_each_alone:
            return teaching.by_links(everyone, [self.names.index(name) for name in self.mine])
        return teaching.from_the_others(everyone.sum(0), own)

    def gather(self, logits: Tensor, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the logits of all peers for our rows, [K, B, C], in name order.

        Args:
            logits: of our peers for our rows, [k, B, C].
            count: rows of the whole part of the batch, over all slices.
            dtype: what is sent (default: the logits' own).
        """
        if len(self.mine) == len(self.names):
            return logits
        shape = (max(map(len, self._held)), -(-count // self._narrowest), logits.shape[-1])
        sent = torch.zeros(shape, dtype=dtype or logits.dtype, device=self.device)
        sent[: logits.shape[0], : logits.shape[1]] = logits
        received = [torch.empty_like(sent) for _ in self._held]
        dist.all_gather(received, sent)
        lo, hi = self.rows(count)
        peers = []
        for name in self.names:
            pieces = []
            cuts = bounds(count, len(self.ranks[name]))
            for rank, (start, stop) in zip(self.ranks[name], cuts, strict=True):
                first, end = max(lo, start), min(hi, stop)
                if first < end:
                    block = received[rank][self._held[rank].index(name)]
                    pieces.append(block[first - start : end - start])
            peers.append(torch.cat(pieces) if pieces else sent[0, :0])
        return torch.stack(peers).to(logits.dtype)

    def sum_over_rows(self, sums: Tensor) -> Tensor:
        """Add a tensor of sums over our rows to those of all other processes."""
        if self.processes.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def named(self, names: Iterable[str]) -> list[str]:
        """Return the peers that any process names, in name order."""
        ours = set(names)
        word = torch.tensor([float(name in ours) for name in self.names], device=self.device)
        found = self.sum_over_rows(word).tolist()
        return [name for name, count in zip(self.names, found, strict=True) if count]

    def of_all_peers(self, ours: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Add up over all processes, in one exchange, what each step ends with.

        Args:
            ours: sums over our rows of our peers' losses, [k, P].
            asked: 1 for what this process asks for, else 0, [A].

        Returns:
            Sums over all rows of all peers' losses, [K, P], and how many processes ask, [A].
        """
        if self.processes.world_size == 1:
            return ours, asked
        losses = ours.new_zeros(len(self.names), ours.shape[1])
        losses[[self.names.index(name) for name in self.mine]] = ours
        both = torch.cat([losses.flatten(), asked.to(losses, non_blocking=True)])
        dist.all_reduce(both)
        return both[: losses.numel()].view_as(losses), both[losses.numel() :]

    def share_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Give all processes of a peer its leader's running statistics.

        Those are evaluated and saved; batch norms that span the processes agree anyway.
        """
        if len(self._members) > 1 and not self._spans_batch_norm:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=self._members[0], group=self._group)
