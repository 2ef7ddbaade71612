"""LeNet and DavidNet: parameters, shapes, and the function that the papers write down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbzoo.errors import UsageError
from lbzoo.models.davidnet import ConvBlock, DavidNet, Residual
from lbzoo.models.lenet import LeNet
from lbzoo.registry import models


@pytest.mark.parametrize(("name", "parameters"), [("lenet", 61_706), ("davidnet", 6_573_120)])
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in models.get(name)().parameters()) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("resnet50", 25_557_032), ("resnetv2_50", 25_549_352)])
def test_parameter_counts_of_timms(name: str, parameters: int) -> None:
    import timm

    with torch.device("meta"):
        made = timm.create_model(name)
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters


def test_lenet_against_the_layers_of_the_paper() -> None:
    """C1, S2, C3, S4, C5, F6 and the output, written with unpadded convolutions on 32x32 pixels."""
    torch.manual_seed(0)
    made, images = LeNet(), torch.randn(3, 1, 28, 28)
    x = F.pad(images, (2, 2, 2, 2))
    x = F.max_pool2d(F.conv2d(x, made.conv1.weight, made.conv1.bias).relu(), 2)
    assert x.shape == (3, 6, 14, 14)
    x = F.max_pool2d(F.conv2d(x, made.conv2.weight, made.conv2.bias).relu(), 2)
    assert x.shape == (3, 16, 5, 5)
    x = F.conv2d(x, made.fc1.weight.view(120, 16, 5, 5), made.fc1.bias).relu().flatten(1)  # C5 is a convolution there
    x = made.fc3(made.fc2(x).relu())
    torch.testing.assert_close(made(images), x)


def test_lenet_names_the_size_that_it_takes() -> None:
    with pytest.raises(UsageError, match="the model lenet takes images of 28x28 pixels, not 32x32"):
        LeNet()(torch.zeros(1, 1, 32, 32))


def test_davidnet_layer_by_layer() -> None:
    made = DavidNet(width=8)
    shapes = []
    for layer in (made.prep, made.layer1, made.layer2, made.layer3):
        layer.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    assert made(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in made.modules()) == 9
    assert sum(isinstance(layer, Residual) for layer in made.modules()) == 2
    assert made.fc.bias is None


def test_davidnets_head_is_a_4x4_pool_and_scaled_logits() -> None:
    torch.manual_seed(0)
    made = DavidNet(width=8).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = made.layer3(made.layer2(made.layer1(made.prep(images))))
    torch.testing.assert_close(made(images), 0.125 * F.max_pool2d(maps, 4).flatten(1) @ made.fc.weight.T)


def test_a_residual_against_the_formula() -> None:
    torch.manual_seed(0)
    block, x = Residual(4).eval(), torch.randn(2, 4, 5, 5)

    def conv(part: ConvBlock, x: torch.Tensor) -> torch.Tensor:
        weight, norm = part[0].weight, part[1]
        return F.batch_norm(F.conv2d(x, weight, padding=1), norm.running_mean, norm.running_var, eps=norm.eps).relu()

    torch.testing.assert_close(block(x), x + conv(block.block2, conv(block.block1, x)))


@pytest.mark.parametrize("size", [8, 28, 40])
def test_davidnet_takes_other_sizes_and_channels(size: int) -> None:
    assert DavidNet(width=4, in_chans=1, num_classes=7)(torch.randn(2, 1, size, size)).shape == (2, 7)
