"""LeNet-5 for MNIST: LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998), section II.B.

Layer sizes are the paper's: 6 and 16 maps by 5x5 convolutions, each halved, then 120, 84 and the classes. As is usual
since, activations are ReLU, maps are halved by their maximum, every map of the second convolution sees all six of the
first, and the last layer is linear: 61,706 parameters. LAMB (section G) does not say which form it trained.
"""

from __future__ import annotations

from torch import Tensor, nn

from lbzoo.errors import UsageError
from lbzoo.registry import register_model

IMAGE_SIZE = 28


class LeNet(nn.Module):
    """Images [N, in_chans, 28, 28], which the first convolution pads to the paper's 32x32, to logits [N, classes]."""

    def __init__(self, *, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 6, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            height, width = images.shape[-2:]
            raise UsageError(f"the model lenet takes images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, not {height}x{width}")
        maps = self.pool(self.conv1(images).relu())
        maps = self.pool(self.conv2(maps).relu())
        features = self.fc2(self.fc1(maps.flatten(1)).relu()).relu()
        logits: Tensor = self.fc3(features)
        return logits


@register_model("lenet")
def lenet(*, num_classes: int = 10, in_chans: int = 1) -> LeNet:
    """LeNet-5 for 28x28 images, of LAMB's table 7: 61,706 parameters."""
    return LeNet(num_classes=num_classes, in_chans=in_chans)
