"""Where the work is done: the only module that knows devices, processes and ranks.

Today one process holds every peer. What a step needs of a placement is small: which rows of the
batch are ours, how a network is wrapped, and how sums over rows become sums over all processes.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dml_accel.config import Config, UsageError


class Placement:
    """Every peer on one device.

    Attributes:
        device: where the networks and batches are.
        rank: this process among ``world_size``; rank 0 speaks and writes.
        kind: the resolved placement, as in results.json.
    """

    kind = "replicate"

    def __init__(self, config: Config) -> None:
        self._accelerator = Accelerator(cpu=config.cpu)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        if self.world_size > 1:
            raise UsageError("this version trains in one process; start it with plain python")
        if config.float64 and self.device.type == "mps":
            raise UsageError("--float64: Apple GPUs have no double precision; add --cpu")

    @property
    def mixed_precision(self) -> str:
        """``no``, ``bf16`` or ``fp16``."""
        return str(self._accelerator.mixed_precision)

    def ranks(self, peers: Sequence[str]) -> dict[str, list[int]]:
        """Return the ranks that hold each peer."""
        return {name: list(range(self.world_size)) for name in peers}

    def prepare(self, net: nn.Module) -> nn.Module:
        """Move a network to the device and wrap it for training."""
        return self._accelerator.prepare_model(net, evaluation_mode=True)

    def rows(self, count: int) -> tuple[int, int]:
        """Return the first and one past the last of the ``count`` rows that are ours."""
        return 0, count

    @contextlib.contextmanager
    def micro_batch(self, nets: Sequence[nn.Module], last: bool) -> Iterator[None]:
        """Surround forward and backward of one part of a batch; gradients meet in the last."""
        yield

    def sum_over_rows(self, sums: Tensor) -> Tensor:
        """Add a tensor of sums over our rows to those of all other processes."""
        return sums
