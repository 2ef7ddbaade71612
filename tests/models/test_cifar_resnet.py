"""The networks of He et al. section 4.2: sizes, shapes, shortcuts without parameters, and where tasks find them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.models.cifar_resnet import BasicBlock, CifarResNet
from lbzoo.registry import models
from lbzoo.tasks.image_classification import ImageClassification

DEPTHS = (20, 32, 44, 56, 110)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_by_formula(depth: int, num_classes: int, in_chans: int) -> int:
    """Written from the paper's table of the architecture: 1 + 2n layers of 16, 2n of 32, 2n of 64, and a classifier."""
    n = (depth - 2) // 6
    widths = [16] * (2 * n + 1) + [32] * 2 * n + [64] * 2 * n
    inputs = [in_chans, *widths[:-1]]
    convolutions = sum(9 * i * o for i, o in zip(inputs, widths, strict=True))
    return convolutions + 2 * sum(widths) + 64 * num_classes + num_classes


def test_the_depths_of_the_paper() -> None:
    assert models.names("cifar_resnet*") == sorted(f"cifar_resnet{depth}" for depth in DEPTHS)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("num_classes", "in_chans"), [(10, 3), (7, 1)])
def test_parameter_counts(depth: int, num_classes: int, in_chans: int) -> None:
    with torch.device("meta"):
        made = models.get(f"cifar_resnet{depth}")(num_classes=num_classes, in_chans=in_chans)
    assert count(made) == parameters_by_formula(depth, num_classes, in_chans)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_published_parameter_counts(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(models.get(f"cifar_resnet{depth}")()) == parameters


@pytest.mark.parametrize("depth", [20, 56])
def test_as_many_layers_as_the_name_says(depth: int) -> None:
    with torch.device("meta"):
        made = models.get(f"cifar_resnet{depth}")()
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in made.modules()) == depth


@pytest.mark.parametrize("size", [8, 15, 32])
def test_sizes_of_the_stages(size: int) -> None:
    made = CifarResNet(1, num_classes=5, in_chans=2)
    shapes: list[torch.Size] = []
    for block in made.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    assert made(torch.randn(3, 2, size, size)).shape == (3, 5)
    halves = [size, -(-size // 2), -(-size // 4)]
    expected = [(3, channels, side, side) for channels, side in zip((16, 32, 64), halves, strict=True)]
    assert [tuple(shape) for shape in shapes] == expected


@pytest.mark.parametrize("size", [4, 5])
def test_shortcut_is_every_second_pixel_and_zeros(size: int) -> None:
    """As a 1x1 convolution with an identity for a weight."""
    block = BasicBlock(16, 32, stride=2)
    x = torch.randn(2, 16, size, size)
    expected = F.conv2d(x, torch.eye(32, 16)[:, :, None, None], stride=2)
    assert torch.equal(block.shortcut(x), expected)
    assert torch.equal(BasicBlock(16, 16, stride=1).shortcut(x), x)


def test_shortcuts_hold_no_parameters() -> None:
    block = BasicBlock(16, 32, stride=2)
    assert [name for name, _ in block.named_parameters()] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "conv2.weight",
        "bn2.weight",
        "bn2.bias",
    ]


def test_a_block_against_the_formula() -> None:
    torch.manual_seed(0)
    block = BasicBlock(16, 32, stride=2).eval()
    x = torch.randn(2, 16, 8, 8)
    hidden = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    expected = F.relu(block.bn2(F.conv2d(hidden, block.conv2.weight, padding=1)) + block.shortcut(x))
    torch.testing.assert_close(block(x.clone()), expected)


def test_initialisation_is_that_of_he_by_fan_in() -> None:
    torch.manual_seed(0)
    made = CifarResNet(3)
    weight = made.blocks[-1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_channels_last_is_the_same_function() -> None:
    torch.manual_seed(0)
    made = CifarResNet(1, in_chans=1).eval()
    images = torch.randn(4, 1, 8, 8)
    expected = made(images)
    torch.testing.assert_close(made.to(memory_format=torch.channels_last)(images), expected)


# --- task.model -------------------------------------------------------------------------------------------------------


def task(**changes: object) -> ImageClassification:
    return ImageClassification(**{"model": "cifar_resnet20", "num_classes": 10, "input_shape": (1, 8, 8), **changes})


def test_the_task_finds_ours_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it would fail
    made = task()
    assert isinstance(made.model, CifarResNet)
    assert made(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_the_nearest_of_ours_is_named() -> None:
    with pytest.raises(UnknownNameError, match="no model named 'cifar_resnet65'; did you mean 'cifar_resnet56'"):
        task(model="cifar_resnet65")


def test_an_option_that_it_does_not_take() -> None:
    with pytest.raises(UsageError, match=r"cifar_resnet20 cannot be built with .*drop_rate=0.1"):
        task(drop_rate=0.1)
