"""timm's ResNets with a stem for small images: ``timm:resnet18[stem=cifar]``.

Those networks halve an image twice before their first block, which leaves 8 x 8 of a CIFAR image.
The literature on CIFAR uses a 3 x 3 convolution of stride 1 and no pooling instead. timm has no
argument for it, so each network is registered a second time, as ``<name>_cifar_stem``.
"""

from collections.abc import Callable
from typing import Any

import timm
from timm.layers import create_conv2d
from timm.models import load_pretrained, register_model
from torch import nn

_SUFFIX = "_cifar_stem"


def with_cifar_stem(arch: str) -> str:
    """Return timm's name of a ResNet with a stem for small images; empty if it has none.

    Networks whose stem is not a single convolution of 7 x 7 have none.
    """
    return f"{arch}{_SUFFIX}" if arch in _RESNETS else ""


def _register(name: str) -> None:
    build: Callable[..., nn.Module] = timm.model_entrypoint(name)

    def network(pretrained: bool = False, **kw: Any) -> nn.Module:
        net: Any = build(pretrained=False, **kw)
        first = net.conv1
        if not isinstance(first, nn.Conv2d):
            raise ValueError("stem=cifar replaces the first convolution; drop stem_type")
        net.conv1 = create_conv2d(first.in_channels, first.out_channels, 3)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's
        net.maxpool = nn.Identity()
        net.pretrained_cfg["input_size"] = (3, 32, 32)
        for info in net.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)
        if pretrained:
            load_pretrained(net, num_classes=net.num_classes, in_chans=first.in_channels)
        return net

    network.__name__, network.__module__ = f"{name}{_SUFFIX}", __name__
    network.__doc__ = f"timm's {name} with a 3 x 3 convolution of stride 1 and no pooling."
    register_model(network)


_RESNETS = frozenset(
    name
    for name in timm.list_models(module="resnet")
    if (known := timm.get_pretrained_cfg(name)) and known.first_conv == "conv1"
)
for _name in sorted(_RESNETS):
    _register(_name)
