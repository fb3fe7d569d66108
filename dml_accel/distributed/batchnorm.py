"""Batch normalisation whose statistics span a group of processes, or are exact in channels last.

Forward and backward give what a single process would compute on all rows of the group together, for
slices of any size above zero. torch's SyncBatchNorm works on CUDA only, and converting to it loses
the activation that timm fuses into its own layers. On CUDA the kernels are those of SyncBatchNorm,
which start fewer operations. ``DML_FUSED_BATCH_NORM=0`` in the environment uses the
same operations there as everywhere else.

In the layout channels last, torch's kernels for CPUs add up all pixels of a channel one after the
other: in single precision their mean is 60 times less exact than in the contiguous layout. Here the
same kernels are given several neighbouring pixels as channels of their own, so that each adds up
few of them, and these sums are added (``_Blocks``). That is as exact, and as fast.

Shape letters: B rows of this process, C channels, W processes of the group, N rows and pixels of
this process, G blocks.
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

# Numbers that a kernel adds to at once, all channels and blocks together: they fit into the first
# cache of a core. And at least so many blocks, however many channels there are.
_WIDTH, _LEAST_BLOCKS = 1024, 32
_statistics = torch.ops.aten.batch_norm_update_stats
_backward = torch.ops.aten.native_batch_norm_backward


class _Blocks:
    """Images in channels last as a table whose rows hold several pixels: [N / G, G C].

    Args:
        shape: of the images, [B, C, H, W].
    """

    def __init__(self, shape: torch.Size) -> None:
        rows, self._channels, height, width = shape
        self.pixels = rows * height * width
        most = max(_WIDTH // self._channels, _LEAST_BLOCKS)
        self._count = next(g for g in range(min(most, self.pixels), 0, -1) if self.pixels % g == 0)

    def table(self, images: Tensor) -> Tensor:
        """Return images [B, C, H, W] as a table; it shares their memory."""
        return images.permute(0, 2, 3, 1).reshape(-1, self._count * self._channels)

    def images(self, table: Tensor, like: Tensor) -> Tensor:
        """Return a table as images of the shape of others."""
        rows, channels, height, width = like.shape
        return table.view(rows, height, width, channels).permute(0, 3, 1, 2)

    def repeat(self, *of_channels: Tensor) -> tuple[Tensor, ...]:
        """Return numbers of channels [C] as numbers of the columns of a table."""
        return torch.stack(of_channels).repeat(1, self._count).unbind()

    def by_block(self, of_columns: Tensor) -> Tensor:
        """Return numbers of columns as [G, C]."""
        return of_columns.view(self._count, self._channels)

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each channel."""
        means, variances = map(self.by_block, _statistics(self.table(images), None, None, 0.0))
        between, mean = torch.var_mean(means, 0, correction=0)
        # The variance of the means is added, so no two large numbers are subtracted.
        return mean, variances.mean(0).add_(between)

    def sums(self, dy: Tensor, x: Tensor, *of_channels: Tensor, eps: float) -> Tensor:
        """Return the sums of dy and of dy x^ over all pixels of each channel, [2, C].

        Args:
            dy: a table of gradients.
            x: a table of what was normalised to x^.
            of_channels: weight, mean and variance [C].
            eps: added to the variance.
        """
        unused = dy.new_empty(0)
        asked = (unused, unused, False, eps, [False, True, True])
        _, of_dy_x, of_dy = _backward(dy, x, *self.repeat(*of_channels), *asked)
        return torch.stack([of_dy, of_dy_x]).view(2, self._count, self._channels).sum(1)


def _needs_blocks(x: Tensor) -> bool:
    """Whether torch would add up the pixels of x one after the other, in single precision."""
    is_single_on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    # Of one channel or one pixel, both layouts are the same.
    in_order = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return is_single_on_cpu and in_order and not x.is_contiguous()


class _Normalise(torch.autograd.Function):
    """Normalise with the group's statistics; the gradient passes through them.

    The group is None for a process by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor | int, Tensor, Tensor]:
        count: Tensor | int
        if group is None:
            count = x.numel() // x.shape[1]
            mean, var = _own_statistics(x)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            count, mean, var = _group_statistics(wide, group)
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group, ctx.count = eps, group, count
        ctx.mark_non_differentiable(*([mean, var] if group is None else [count, mean, var]))
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
        blocks = _Blocks(x.shape) if _needs_blocks(x) else None
        if blocks is None:
            fixed, grad_weight, grad_bias = _backward(
                grad, x, weight, mean, var, unused, unused, False, ctx.eps, [True, True, True]
            )
            sums = torch.stack([grad_bias, grad_weight])
        else:
            table = blocks.table(x)
            dy = blocks.table(grad.contiguous(memory_format=torch.channels_last))
            sums = blocks.sums(dy, table, weight, mean, var, eps=ctx.eps)
            # Weight and bias get the part of our rows; DDP adds up the group's, as for all others.
            grad_bias, grad_weight = sums if ctx.group is None else sums.clone()
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        sum_dy, sum_dy_x = sums / -ctx.count
        # What flows through the statistics is offset + slope x.
        slope = weight * inverse_std**2 * sum_dy_x
        offset = weight * inverse_std * sum_dy - slope * mean
        if blocks is None:
            shape = (1, -1, *[1] * (x.dim() - 2))
            through = torch.addcmul(offset.view(shape), x, slope.view(shape))
            return fixed.add_(through), grad_weight, grad_bias, None, None
        scale, slope, offset = blocks.repeat(weight * inverse_std, slope, offset)
        dx = torch.addcmul(offset, table, slope).addcmul_(dy, scale)
        return blocks.images(dx, x), grad_weight, grad_bias, None, None


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
    mean, var = _own_statistics(x)
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


def _own_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [C] and biased variance [C] of x [B, C, ...] in this process."""
    if _needs_blocks(x):
        return _Blocks(x.shape).statistics(x)
    if x.device.type == "cpu":  # the same numbers, four times as fast
        mean, var = _statistics(x, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    return mean, var


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


def _normalises(layer: Any, x: Tensor) -> bool:
    """Whether a layer normalises x in its own way, not as its class in torch or timm does."""
    if not layer.training:
        return False
    # The compiler adds up in pairs itself (``compile.adds_up_in_pairs``); it cannot see into ours.
    return layer.group is not None or (not torch.compiler.is_compiling() and _needs_blocks(x))


class GroupBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` over a group of processes; over this one, exact in channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W]."""
        return _normalise(self, x) if _normalises(self, x) else super().forward(x)


class GroupBatchNormAct2d(BatchNormAct2d):
    """timm's batch norm with its fused dropout and activation, in the same two ways."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W] and activate."""
        if not _normalises(self, x):
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
        if not _spans(layer):
            what = "without weights or running statistics"
            if type(layer) not in _SPANNING:
                what = f"of type {type(layer).__name__}"
            raise UsageError(
                f"{name}: layer {path} is a batch norm {what}, which cannot span processes: use "
                "--batch-norm local, which keeps the statistics of each process apart"
            )


def _spans(layer: nn.Module) -> bool:
    """Whether a layer can be replaced by one of ours."""
    if type(layer) not in _SPANNING:
        return False
    return layer.weight is not None and bool(layer.track_running_stats)


def span_group(net: nn.Module, group: Any) -> None:
    """Make every batch norm of ``net`` span ``group``, in place: weights and names stay.

    Args:
        net: the network.
        group: the process group; None for this process by itself, where the layers compute as
            before, but exactly in channels last.
    """
    layers: Iterator[Any] = net.modules()
    for layer in filter(_spans, layers):
        layer.__class__ = _SPANNING[type(layer)]
        layer.group = group
        layer.is_fused = os.environ.get("DML_FUSED_BATCH_NORM") != "0"
