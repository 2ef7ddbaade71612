"""DavidNet: the nine-layer residual network that trains on CIFAR-10 in 24 epochs.

David Page, "How to train your ResNet" (2018, the DAWNBench entry), which LAMB's table 6 trains: a convolution to 64
channels, three stages that double them and halve the image by its maximum, a residual pair of convolutions in the first
and the last stage, the maximum over the image, a classifier without bias, and logits times 0.125.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lbzoo.registry import register_model

LOGIT_SCALE = 0.125


class ConvBlock(nn.Sequential):
    """relu(bn(conv(x))), 3x3."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    """x + block(block(x)), at one size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(channels, channels)
        self.block2 = ConvBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block2(self.block1(x))
        return out


class DavidNet(nn.Module):
    """Images [N, in_chans, H, W] of 8x8 pixels and more to logits [N, classes]. ``width``: channels of the first layer.

    The maximum over the whole image is the original's 4x4 pool at its 32x32 pixels.
    """

    def __init__(self, *, num_classes: int = 10, in_chans: int = 3, width: int = 64) -> None:
        super().__init__()
        self.prep = ConvBlock(in_chans, width)
        self.layer1 = nn.Sequential(ConvBlock(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width))
        self.layer2 = nn.Sequential(ConvBlock(2 * width, 4 * width), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(ConvBlock(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width))
        self.fc = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer3(self.layer2(self.layer1(self.prep(images))))
        features = F.max_pool2d(maps, maps.shape[-2:]).flatten(1)
        logits: Tensor = self.fc(features) * LOGIT_SCALE
        return logits


@register_model("davidnet")
def davidnet(*, num_classes: int = 10, in_chans: int = 3, width: int = 64) -> DavidNet:
    """Page's nine-layer network for CIFAR-10, of LAMB's table 6: 6.57 million parameters at a width of 64."""
    return DavidNet(num_classes=num_classes, in_chans=in_chans, width=width)
