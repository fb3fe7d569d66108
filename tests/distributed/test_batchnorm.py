"""Batch norm over processes: what is converted, what is refused; test_processes has the values."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dml_accel.core.errors import UsageError
from dml_accel.distributed.batchnorm import (
    GroupBatchNorm2d,
    GroupBatchNormAct2d,
    check_spanning,
    span_group,
)
from tests.helpers import Training


def test_every_batch_norm_is_converted_with_weights_and_names_kept() -> None:
    net = timm.create_model("wrn_16_2_cifar", num_classes=10)
    before = net.state_dict()
    kinds = [type(layer) for layer in net.modules()]
    check_spanning(net, "wrn_16_2-0")
    span_group(net, None)
    after = [type(layer) for layer in net.modules()]
    expected = {BatchNormAct2d: GroupBatchNormAct2d, nn.BatchNorm2d: GroupBatchNorm2d}
    assert after == [expected.get(kind, kind) for kind in kinds]
    assert GroupBatchNormAct2d in after
    for name, value in net.state_dict().items():
        assert value is before[name] or torch.equal(value, before[name])


@pytest.mark.parametrize("shape", [(2, 3, 5, 5)])
def test_evaluation_equals_the_native_layers(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for layer in (nn.BatchNorm2d(3), BatchNormAct2d(3)):
        nn.init.uniform_(layer.weight)
        expected = layer.eval()(x)
        spanning = nn.Sequential(layer)
        span_group(spanning, None)
        assert torch.equal(spanning.eval()(x), expected)


def test_a_batch_norm_of_another_kind_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm3d(3))
    message = "a-0: layer 1 is a batch norm of type BatchNorm3d.*--batch-norm local"
    with pytest.raises(UsageError, match=message):
        check_spanning(net, "a-0")
    with pytest.raises(UsageError, match="without weights or running statistics"):
        check_spanning(nn.Sequential(nn.BatchNorm2d(3, affine=False)), "a-0")


def test_one_process_keeps_the_native_layers(training: Callable[..., Training]) -> None:
    peers = training(cohort=("resnet8", "wrn_16_2")).peers
    kinds = {type(layer) for peer in peers for layer in peer.net.modules()}
    assert {nn.BatchNorm2d, BatchNormAct2d} <= kinds
    assert not kinds & {GroupBatchNorm2d, GroupBatchNormAct2d}
