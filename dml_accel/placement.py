"""Where the work of a cohort is done: which peers and rows are ours, and how gradients meet.

Placement ``replicate``: every process holds every peer and works on its own rows of each batch;
gradients are averaged over all processes, so that the cohort takes the steps of one process. What
a step needs of a placement is small: which rows are ours, how a network is wrapped, and how sums
over rows become sums over all processes.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_accel.batchnorm import span_group
from dml_accel.config import Config
from dml_accel.keys import bounds
from dml_accel.processes import Processes

# torch 2.15 gave the argument a new name.
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False
}


class Placement:
    """Every peer in every process.

    Attributes:
        processes: those that share the work.
        device: where this process's networks and batches are.
        rank: this process among ``world_size``.
        kind: the resolved placement, as in results.json.
    """

    kind = "replicate"

    def __init__(self, config: Config, processes: Processes) -> None:
        self.processes = processes
        self.device, self.rank = processes.device, processes.rank
        self.world_size = processes.world_size
        self._spans_batch_norm = config.batch_norm == "group" and self.world_size > 1

    def ranks(self, peers: Sequence[str]) -> dict[str, list[int]]:
        """Return the ranks that hold each peer."""
        return {name: list(range(self.world_size)) for name in peers}

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a network to the device, in place, and wrap it for training.

        Args:
            module: the bare network; its batch norms span the processes afterwards, unless the
                configuration says ``local``.

        Returns:
            What to call in training.
        """
        if self._spans_batch_norm:
            span_group(module, None)
        module = self.processes.accelerator.prepare_model(module, evaluation_mode=True)
        if self.world_size == 1:
            return module
        # Buffers need no broadcast before each step: training never reads running statistics.
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **_NO_BUFFERS,
        )

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler for one peer; outside fp16 it does nothing."""
        return torch.amp.GradScaler(
            self.device.type, enabled=self.processes.mixed_precision == "fp16"
        )

    def rows(self, count: int) -> tuple[int, int]:
        """Return the first and one past the last of the ``count`` rows that are ours."""
        return bounds(count, self.world_size)[self.rank]

    @property
    def gradient_scale(self) -> int:
        """What a sum over our rows is multiplied by, as gradients are divided by the processes."""
        return self.world_size

    @contextlib.contextmanager
    def micro_batch(self, nets: Sequence[nn.Module], last: bool) -> Iterator[None]:
        """Surround forward and backward of one part of a batch; gradients meet in the last."""
        with contextlib.ExitStack() as stack:
            for net in nets:
                if isinstance(net, DistributedDataParallel) and not last:
                    stack.enter_context(net.no_sync())
            yield

    def sum_over_rows(self, sums: Tensor) -> Tensor:
        """Add a tensor of sums over our rows to those of all other processes."""
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def share_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Give every process rank 0's running statistics: those that are evaluated and saved."""
        if self.world_size > 1 and not self._spans_batch_norm:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)
