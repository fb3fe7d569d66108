"""A network that relies on the usual layout of images, as somebody's own may."""

import torch
from timm.models import register_model
from torch import nn


class Viewing(nn.Module):
    """A convolution whose output is viewed, not flattened: images of 8 x 8 pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, num_classes)
        self.pretrained_cfg = {"architecture": "viewing"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(len(x), -1))


@register_model
def viewing(pretrained: bool = False, num_classes: int = 10, **_: object) -> nn.Module:
    return Viewing(num_classes)
