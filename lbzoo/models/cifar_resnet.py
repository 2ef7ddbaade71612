"""The residual networks for CIFAR-10: He et al., "Deep Residual Learning" (arXiv 1512.03385), section 4.2.

6n + 2 layers: a 3x3 convolution to 16 channels, three stages of n blocks with 16, 32 and 64 channels, of which the last
two begin with a stride of 2, the mean over the image, and a linear classifier. Shortcuts are option A: where a stage
begins, every second pixel, and zeros for the channels that are new, so that they hold no parameters. timm's and
torchvision's ResNets are those for ImageNet.

The weights start as in He et al. 2015 (fan in), which the paper says it uses; the biases, where torch puts them. The
keywords have timm's names, so that a recipe may exchange one network for another.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lbzoo.registry import register_model

CHANNELS = (16, 32, 64)  # of the three stages


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), both convolutions 3x3, the first with the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, channels, H / stride, W / stride], rounded up."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A. The zeros go after the channels that are there."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """A ResNet of 6 ``blocks_per_stage`` + 2 layers; images [N, in_chans, H, W] of any size to logits [N, classes]."""

    def __init__(self, blocks_per_stage: int, *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_chans, CHANNELS[0])
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        blocks: list[BasicBlock] = []
        in_channels = CHANNELS[0]
        for channels in CHANNELS:
            for block in range(blocks_per_stage):
                stride = 2 if block == 0 and channels != CHANNELS[0] else 1
                blocks.append(BasicBlock(in_channels, channels, stride))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(in_channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn1(self.conv1(images)), inplace=True))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


@register_model("cifar_resnet20")
def cifar_resnet20(*, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """He et al.'s ResNet-20 for CIFAR-10: 0.27 million parameters."""
    return CifarResNet(3, num_classes=num_classes, in_chans=in_chans)


@register_model("cifar_resnet32")
def cifar_resnet32(*, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """He et al.'s ResNet-32 for CIFAR-10: 0.46 million parameters."""
    return CifarResNet(5, num_classes=num_classes, in_chans=in_chans)


@register_model("cifar_resnet44")
def cifar_resnet44(*, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """He et al.'s ResNet-44 for CIFAR-10: 0.66 million parameters."""
    return CifarResNet(7, num_classes=num_classes, in_chans=in_chans)


@register_model("cifar_resnet56")
def cifar_resnet56(*, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """He et al.'s ResNet-56 for CIFAR-10, VRGD's of table 5: 0.85 million parameters."""
    return CifarResNet(9, num_classes=num_classes, in_chans=in_chans)


@register_model("cifar_resnet110")
def cifar_resnet110(*, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """He et al.'s ResNet-110 for CIFAR-10: 1.7 million parameters."""
    return CifarResNet(18, num_classes=num_classes, in_chans=in_chans)


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
