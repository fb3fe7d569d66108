"""Prepare a network for training: on the device, compiled, or shared by several processes (DDP)."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dml_accel.core.config import OptimConfig
from dml_accel.data.batches import ImageFormat, slices
from dml_accel.distributed.batchnorm import span_group
from dml_accel.distributed.compile import compiling, or_eager
from dml_accel.distributed.placement import Placement
from dml_accel.models.build import set_memory_format

# torch 2.15 renamed the argument.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class Wrapper:
    """Prepares the networks of one process.

    Args:
        placement: who trains what.
        optim: batch and micro-batches.
        images: what the networks are given.
        mode: of torch.compile.
    """

    def __init__(
        self, placement: Placement, optim: OptimConfig, images: ImageFormat, mode: str = "default"
    ) -> None:
        self._placement, self._images, self._mode = placement, images, mode
        parts = slices(optim.batch_size, optim.grad_accum)
        self._micro_batches = sorted({stop - start for start, stop in parts})

    def wrap(self, module: nn.Module, name: str = "", compiled: bool = False) -> nn.Module:
        """Move a network to the device, in place, and wrap it for training.

        Args:
            module: the bare network. Its batch norms span the peer's processes afterwards, unless
                the configuration says ``local``; those of one process are exact in any layout.
            name: of the peer, for messages.
            compiled: whether to compile it, if no other process trains it; if compiling fails, a
                message says so and the network runs eagerly.

        Returns:
            What to call in training.
        """
        placement = self._placement
        if placement.spans_batch_norm:
            span_group(module, placement.group or dist.group.WORLD)
        elif self._images.layout == torch.channels_last and self._images.dtype == torch.float32:
            span_group(module, None)
        set_memory_format(module, self._images.layout)
        accelerator = placement.processes.accelerator
        with compiling(accelerator, compiled and placement.is_alone, self._mode):
            net = accelerator.prepare_model(module, evaluation_mode=True)
        if placement.is_alone:
            return or_eager(net, name, self._warm_up)
        # Buffers need no broadcast before each step: training never reads running statistics.
        net = DistributedDataParallel(
            net,
            device_ids=[placement.device] if placement.device.type == "cuda" else None,
            process_group=placement.group,
            **_NO_BUFFERS,
        )
        self._warm_up(net)
        return net

    def place(self, module: nn.Module) -> nn.Module:
        """Move a network that is not trained to the device, in place, in the run's precision."""
        set_memory_format(module, self._images.layout)
        accelerator = self._placement.processes.accelerator
        return accelerator.prepare_model(module, evaluation_mode=True).eval()

    def _warm_up(self, net: nn.Module) -> None:
        """Take a backward pass, without effect, for each size of a micro-batch.

        This compiles a network. And after its first backward pass DDP rearranges its buckets, and
        with them the order of its sums: a resumed run would do that at another step than one that
        was never interrupted.
        """
        before = [buffer.clone() for buffer in net.buffers()]
        try:
            # Sizes of whole micro-batches: all processes of a peer take the same number of passes.
            for count in self._micro_batches:
                lo, hi = self._placement.rows(count)
                images = self._images.zeros(hi - lo)
                net(images).sum().backward()
                net.zero_grad()
        finally:  # a network that fails to compile runs eagerly, from where it was
            net.zero_grad()
            with torch.no_grad():
                for buffer, value in zip(net.buffers(), before, strict=True):
                    buffer.copy_(value)
