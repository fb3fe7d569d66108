"""Networks for 32 x 32 of the paper and of distillation, from timm's parts, registered with timm.

After ``import dml_accel``, ``timm.create_model("resnet32_cifar", num_classes=100)`` works, and so
does everything else in timm that takes a name. First convolutions have stride 1: at 32 x 32 the
strides made for 224 x 224 would leave a single pixel. Weights start as torch or timm start them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, downsample_conv
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from dml_accel.models import stems  # noqa: F401  (registers ResNets with another stem)

# CIFAR-100's training split, the default of timm's input settings; runs export their own.
_MEAN, _STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": _MEAN,
        "std": _STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


_RESNET = _cfg("conv1", "fc")
_WRN = _cfg("stem.conv", "head.fc")
default_cfgs = generate_default_cfgs(
    {
        "resnet8_cifar": _RESNET,
        "resnet20_cifar": _RESNET,
        "resnet32_cifar": _RESNET,
        "resnet56_cifar": _RESNET,
        "resnet110_cifar": _RESNET,
        "resnet8x4_cifar": _RESNET,
        "resnet32x4_cifar": _RESNET,
        "mobilenet_cifar": _cfg("conv_stem", "classifier"),
        "inception_cifar": _cfg("stem.0.conv", "fc"),
        "wrn_16_1_cifar": _WRN,
        "wrn_16_2_cifar": _WRN,
        "wrn_16_10_cifar": _WRN,
        "wrn_28_10_cifar": _WRN,
        "wrn_40_1_cifar": _WRN,
        "wrn_40_2_cifar": _WRN,
    }
)


class _Classifier(nn.Module):
    """What timm expects of a network: features, a pooled head, a classifier to replace."""

    def __init__(self, num_features: int, num_classes: int, drop_rate: float, pool: str) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.drop_rate = num_classes, num_features, drop_rate
        self.head_hidden_size = num_features
        self.grad_checkpointing = False
        # Created last by the subclasses, so that parameters come in the order of computation.
        self._pool = pool

    def _add_head(self) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=self._pool
        )

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for ``num_classes`` classes."""
        self.num_classes, self._pool = num_classes, global_pool or self._pool
        self._add_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to features [B, num_features, h, w]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits [B, num_classes], or to what the classifier would read."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions; option A: the shortcut subsamples and pads channels with zeros."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, width - width_in
        self.conv1 = create_conv2d(width_in, width, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = create_conv2d(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.padding:
            half = self.padding // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, half, self.padding - half),
            )
        return F.relu(x + y, inplace=True)


def _projected_block(width_in: int, width: int, stride: int) -> nn.Module:
    """Return timm's block; where the shape changes, its shortcut is a 1 x 1 convolution."""
    same = stride == 1 and width_in == width
    return BasicBlock(
        width_in,
        width,
        stride,
        downsample=None if same else downsample_conv(width_in, width, 1, stride),
    )


class CifarResNet(_Classifier):
    """The CIFAR ResNet of depth 6n + 2 (He et al., CVPR 2016, section 4.2).

    Args:
        blocks: n, in each of three stages.
        widths: channels of the first convolution and of each stage.
        projected: whether shortcuts that change their shape are convolutions with batch norm, as
            in the code of CRD (Tian et al., ICLR 2020); else they are option A, without weights.
    """

    def __init__(
        self,
        blocks: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        projected: bool = False,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(widths[-1], num_classes, drop_rate, global_pool)
        width_in, make = widths[0], _projected_block if projected else _ResidualBlock
        self.conv1 = create_conv2d(in_chans, width_in, 3)
        self.bn1 = nn.BatchNorm2d(width_in)
        layers = []
        for stage, width in enumerate(widths[1:]):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(make(width_in, width, stride))
                width_in = width
        self.layers = nn.Sequential(*layers)
        self.feature_info = [{"num_chs": widths[-1], "reduction": 4, "module": "layers"}]
        self._add_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to features [B, num_features, S / 4, S / 4]."""
        return self.layers(F.relu(self.bn1(self.conv1(x)), inplace=True))


class _InceptionBlock(nn.Module):
    """Four branches side by side: 1x1; 1x1 then 3x3; 1x1 then 5x5; pooling then 1x1."""

    def __init__(self, width_in: int, w1: int, r3: int, w3: int, r5: int, w5: int, wp: int) -> None:
        super().__init__()
        self.branch1 = ConvNormAct(width_in, w1, 1)
        self.branch3 = nn.Sequential(ConvNormAct(width_in, r3, 1), ConvNormAct(r3, w3, 3))
        self.branch5 = nn.Sequential(ConvNormAct(width_in, r5, 1), ConvNormAct(r5, w5, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNormAct(width_in, wp, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pool(x)], 1)


class CifarInception(_Classifier):
    """Inception V1 (Szegedy et al., CVPR 2015, table 1) with batch norm and true 5 x 5 branches."""

    # 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool projection; None halves the resolution.
    _BLOCKS = (
        (64, 96, 128, 16, 32, 32),
        (128, 128, 192, 32, 96, 64),
        None,
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
        None,
        (256, 160, 320, 32, 128, 128),
        (384, 192, 384, 48, 128, 128),
    )

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(1024, num_classes, drop_rate, global_pool)
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, 64, 3), ConvNormAct(64, 64, 1), ConvNormAct(64, 192, 3)
        )
        blocks: list[nn.Module] = []
        width = 192
        for row in self._BLOCKS:
            if row is None:
                blocks.append(nn.MaxPool2d(3, 2, 1))
            else:
                blocks.append(_InceptionBlock(width, *row))
                width = row[0] + row[2] + row[4] + row[5]
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [{"num_chs": 1024, "reduction": 4, "module": "blocks"}]
        self._add_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to features [B, 1024, S / 4, S / 4]."""
        return self.blocks(self.stem(x))


class CifarWideResNet(ResNetV2):
    """Wide ResNet (Zagoruyko and Komodakis, BMVC 2016): timm's body behind a 3 x 3 stem."""

    def __init__(self, stem_chs: int = 16, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(stem_chs=stem_chs, in_chans=in_chans, **kwargs)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", create_conv2d(in_chans, stem_chs, 3))
        for index, info in enumerate(self.feature_info):  # the body's, less the usual stem's 4
            info["reduction"] = 1 if index == 0 else max(1, info["reduction"] // 4)


# timm hands config.json's model_args back as keyword arguments on loading, hence ``defaults | kw``.
def _resnet(name: str, blocks: int, pretrained: bool, kw: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(CifarResNet, name, pretrained, **({"blocks": blocks} | kw))


def _resnet_x4(name: str, blocks: int, pretrained: bool, kw: dict[str, Any]) -> nn.Module:
    wide = {"widths": (32, 64, 128, 256), "projected": True}
    return _resnet(name, blocks, pretrained, wide | kw)


def _wide_resnet(name: str, depth: int, width: int, pretrained: bool, kw: Any) -> nn.Module:
    defaults = {
        "layers": [(depth - 4) // 6] * 3,
        "channels": (16 * width, 32 * width, 64 * width),
        "basic": True,
        "bottle_ratio": 1.0,
        "preact": True,
        "conv_layer": create_conv2d,
        "norm_layer": BatchNormAct2d,
    }
    return build_model_with_cfg(
        CifarWideResNet, name, pretrained, feature_cfg={"flatten_sequential": True}, **defaults | kw
    )


@register_model
def resnet8_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 8."""
    return _resnet("resnet8_cifar", 1, pretrained, kw)


@register_model
def resnet20_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 20."""
    return _resnet("resnet20_cifar", 3, pretrained, kw)


@register_model
def resnet32_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 32, the paper's smallest network."""
    return _resnet("resnet32_cifar", 5, pretrained, kw)


@register_model
def resnet56_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 56."""
    return _resnet("resnet56_cifar", 9, pretrained, kw)


@register_model
def resnet110_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 110."""
    return _resnet("resnet110_cifar", 18, pretrained, kw)


@register_model
def resnet8x4_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 8, four times as wide, with projected shortcuts."""
    return _resnet_x4("resnet8x4_cifar", 1, pretrained, kw)


@register_model
def resnet32x4_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """CIFAR ResNet of depth 32, four times as wide, with projected shortcuts."""
    return _resnet_x4("resnet32x4_cifar", 5, pretrained, kw)


@register_model
def mobilenet_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """MobileNet V1 (Howard et al., 2017) with feature maps of 32, 32, 16, 8 and 4 pixels."""
    stages = ["dsa_r1_k3_s1_c64", "dsa_r2_k3_s1_c128", "dsa_r2_k3_s2_c256"]
    stages += ["dsa_r6_k3_s2_c512", "dsa_r2_k3_s2_c1024"]
    defaults = {
        "block_args": decode_arch_def([[stage] for stage in stages]),
        "num_features": 0,
        "stem_size": 32,
        "norm_layer": nn.BatchNorm2d,
        "act_layer": nn.ReLU6,
    }
    net = build_model_with_cfg(EfficientNet, "mobilenet_cifar", pretrained, **defaults | kw)
    net.conv_stem.stride = (1, 1)  # the builder has no argument for it
    return net


@register_model
def inception_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Inception V1 with batch norm, feature maps of 32, 16 and 8 pixels."""
    return build_model_with_cfg(CifarInception, "inception_cifar", pretrained, **kw)


@register_model
def wrn_16_1_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Wide ResNet of depth 16 and width 1."""
    return _wide_resnet("wrn_16_1_cifar", 16, 1, pretrained, kw)


@register_model
def wrn_16_2_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Wide ResNet of depth 16 and width 2."""
    return _wide_resnet("wrn_16_2_cifar", 16, 2, pretrained, kw)


@register_model
def wrn_16_10_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Wide ResNet of depth 16 and width 10."""
    return _wide_resnet("wrn_16_10_cifar", 16, 10, pretrained, kw)


@register_model
def wrn_28_10_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Wide ResNet of depth 28 and width 10, the paper's largest network."""
    return _wide_resnet("wrn_28_10_cifar", 28, 10, pretrained, kw)


@register_model
def wrn_40_1_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Wide ResNet of depth 40 and width 1."""
    return _wide_resnet("wrn_40_1_cifar", 40, 1, pretrained, kw)


@register_model
def wrn_40_2_cifar(pretrained: bool = False, **kw: Any) -> nn.Module:
    """Wide ResNet of depth 40 and width 2."""
    return _wide_resnet("wrn_40_2_cifar", 40, 2, pretrained, kw)
