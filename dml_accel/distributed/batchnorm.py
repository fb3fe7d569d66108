"""Batch normalisation whose statistics span a group of processes, on any backend.

Forward and backward give what a single process would compute on all rows of the group together, for
slices of any size above zero. torch's SyncBatchNorm works on CUDA only, and converting to it loses
the activation that timm fuses into its own layers. On CUDA the kernels are those of SyncBatchNorm,
which start fewer operations. ``DML_FUSED_BATCH_NORM=0`` in the environment uses the
same operations there as everywhere else.

Shape letters: B rows of this process, C channels, W processes of the group.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dml_accel.core.errors import UsageError


class _Normalise(torch.autograd.Function):
    """Normalise with the group's statistics; the gradient passes through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count, mean, var = _group_statistics(wide, group)
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group, ctx.count = eps, group, count
        ctx.mark_non_differentiable(count, mean, var)
        return y, count, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Take the gradient with fixed statistics, then subtract what flows through them.

        With x^ = (x - mean) / std and sums over all N rows and pixels of the group,
        dx = w / std (dy - sum(dy) / N - x^ sum(dy x^) / N).
        """
        x, weight, mean, var = ctx.saved_tensors
        inverse_std = (var + ctx.eps).rsqrt()
        unused = mean.new_empty(0)  # no statistics of our own batch; CUDA needs a tensor here
        fixed, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, unused, unused, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums, group=ctx.group)
        sum_dy, sum_dy_x = sums / ctx.count
        slope = weight * inverse_std**2 * sum_dy_x
        offset = weight * inverse_std * sum_dy - slope * mean
        shape = (1, -1, *[1] * (x.dim() - 2))
        through = torch.addcmul(offset.view(shape), x, slope.view(shape))
        # Weight and bias get the part of our rows; DDP adds up the group's, as for all parameters.
        return fixed.sub_(through), grad_weight, grad_bias, None, None


class _FusedNormalise(torch.autograd.Function):
    """The same by CUDA's own kernels, as torch's SyncBatchNorm calls them.

    They update the running statistics, and work with 1 / std in place of the variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: Any, momentum: float
    ) -> Tensor:
        x = _dense(x)
        mean, inverse_std = torch.batch_norm_stats(x, layer.eps)
        count = torch.full_like(mean[:1], x.numel() / x.shape[1])
        ours = torch.cat([mean, inverse_std, count])
        table = ours.new_empty(dist.get_world_size(layer.group), len(ours))
        dist.all_gather(list(table), ours, group=layer.group)
        means, inverses, counts = table.split([len(mean), len(mean), 1], dim=1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x,
            means,
            inverses,
            layer.running_mean,
            layer.running_var,
            momentum,
            layer.eps,
            counts.flatten().to(layer.running_mean),
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, counts.to(torch.int32))
        ctx.group = layer.group
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, layer.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        grad = _dense(grad)
        sum_dy, sum_dy_x, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, True, True, True
        )
        sums = torch.cat([sum_dy, sum_dy_x])
        dist.all_reduce(sums, group=ctx.group)
        sum_dy, sum_dy_x = sums.split(len(mean))
        grad_x = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse_std, weight, sum_dy, sum_dy_x, counts
        )
        return grad_x, grad_weight, grad_bias, None, None


def _dense(x: Tensor) -> Tensor:
    """Return x in a layout that the fused kernels read."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _group_statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return count per channel [], mean [C] and biased variance [C] of the group's x [B, C, ...].

    Each process sends its count, mean and variance. The variance of the means is added to the mean
    of the variances, so no two large numbers are subtracted from each other.
    """
    if x.device.type == "cpu":  # the same numbers, four times as fast
        mean, var = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
    else:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
    count = torch.full_like(mean[:1], x.numel() / x.shape[1])
    # Every process fills its own row of zeros: a sum that only adds zeros is an exact all-gather.
    table = x.new_zeros(dist.get_world_size(group), 2 * len(mean) + 1)
    table[dist.get_rank(group)] = torch.cat([count, mean, var])
    dist.all_reduce(table, group=group)
    counts, means, variances = table.split([1, len(mean), len(mean)], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return total, mean, var


def _normalise(layer: Any, x: Tensor) -> Tensor:
    """Normalise with the group's statistics and update the running ones."""
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:  # a cumulative average
        momentum = 1 / layer.num_batches_tracked.item()
    if x.is_cuda and layer.is_fused:
        y: Tensor = _FusedNormalise.apply(x, layer.weight, layer.bias, layer, momentum)
        return y
    y, count, mean, var = _Normalise.apply(x, layer.weight, layer.bias, layer.eps, layer.group)
    with torch.no_grad():
        layer.running_mean.lerp_(mean.to(layer.running_mean), momentum)
        layer.running_var.lerp_((var * count / (count - 1)).to(layer.running_var), momentum)
    return y


class GroupBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` over a group of processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W]."""
        return _normalise(self, x) if self.training else super().forward(x)


class GroupBatchNormAct2d(BatchNormAct2d):
    """timm's batch norm with its fused dropout and activation, over a group of processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W] and activate."""
        if not self.training:
            return super().forward(x)
        return self.act(self.drop(_normalise(self, x)))


_SPANNING: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: GroupBatchNorm2d,
    BatchNormAct2d: GroupBatchNormAct2d,
}


def check_spanning(net: nn.Module, name: str) -> None:
    """Refuse a network with a batch norm that cannot span processes.

    Args:
        net: the network.
        name: of the peer, for the message.

    Raises:
        UsageError: the text names the layer.
    """
    for path, layer in net.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        what = ""
        if type(layer) not in _SPANNING:
            what = f"of type {type(layer).__name__}"
        elif layer.weight is None or not layer.track_running_stats:
            what = "without weights or running statistics"
        if what:
            raise UsageError(
                f"{name}: layer {path} is a batch norm {what}, which cannot span processes: use "
                "--batch-norm local, which keeps the statistics of each process apart"
            )


def span_group(net: nn.Module, group: Any) -> None:
    """Make every batch norm of ``net`` span ``group``, in place: weights and names stay."""
    layers: Iterator[Any] = net.modules()
    for layer in layers:
        if type(layer) in _SPANNING:
            layer.__class__ = _SPANNING[type(layer)]
            layer.group = group
            layer.is_fused = os.environ.get("DML_FUSED_BATCH_NORM") != "0"
