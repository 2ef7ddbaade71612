"""Crops and flips against torchvision's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as peer
from torchvision.transforms import functional as peer_functions

from lbzoo.data import image_transforms as ours

BILINEAR = Image.Resampling.BILINEAR
SIZES = [(500, 375), (375, 500), (64, 64), (301, 97), (256, 257)]  # width, height
FULL_RANGE = (0.08, 1.0)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    return np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_validation_is_torchvisions(size: tuple[int, int], resample: Image.Resampling) -> None:
    image = noise(*size)
    mode = {BILINEAR: peer.InterpolationMode.BILINEAR}.get(resample, peer.InterpolationMode.BICUBIC)
    resized = ours.resize_shorter_side(image, 73, resample)
    assert same(resized, peer.Resize(73, mode)(image))
    for crop in (73, 72, 51, 64):
        assert same(ours.center_crop(resized, crop), peer.CenterCrop(crop)(resized))


@pytest.mark.parametrize("size", SIZES)
def test_random_resized_crop_is_torchvisions_for_the_same_rectangle(size: tuple[int, int]) -> None:
    image = noise(*size)
    for seed in range(5):
        left, top, width, height = ours.random_rectangle(*size, np.random.RandomState(seed), area=FULL_RANGE)
        expected = peer_functions.resized_crop(image, top, left, height, width, [48, 48])
        made = ours.random_resized_crop(image, 48, np.random.RandomState(seed), area=FULL_RANGE, resample=BILINEAR)
        assert same(made, expected)


@pytest.mark.parametrize("size", [(500, 375), (200, 600), (90, 90)])
def test_random_rectangles_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    width, height = size
    draws = 4000
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array([peer.RandomResizedCrop.get_params(image, FULL_RANGE, ours.ASPECT_RATIOS) for _ in range(draws)])
    rng = np.random.RandomState(0)
    mine = np.array([ours.random_rectangle(width, height, rng, area=FULL_RANGE) for _ in range(draws)])
    mine = mine[:, [1, 0, 3, 2]]  # torchvision's order: top, left, height, width
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all()
    assert (mine[:, 1] + mine[:, 3] <= width).all()
    for column in range(4):
        distance = kolmogorov_smirnov(mine[:, column], theirs[:, column])
        assert distance < 1.95 * math.sqrt(2 / draws), column  # exceeded by chance once in a thousand draws


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    places = np.union1d(a, b)
    return float(np.abs(np.searchsorted(np.sort(a), places, "right") / len(a)
                        - np.searchsorted(np.sort(b), places, "right") / len(b)).max())  # fmt: skip


@pytest.mark.parametrize("size", [(1000, 100), (100, 1000), (700, 525)])
def test_rectangle_of_an_image_into_which_no_draw_fits(size: tuple[int, int]) -> None:
    """Area 1 fits only an image of an allowed shape: the fallback is torchvision's."""
    image = torch.zeros(1, size[1], size[0])
    top, left, height, width = peer.RandomResizedCrop.get_params(image, (1.0, 1.0), (0.75, 4 / 3))
    assert ours.random_rectangle(*size, np.random.RandomState(0), area=(1.0, 1.0)) == (left, top, width, height)


def test_random_crop_reaches_every_place() -> None:
    pixels = np.arange(6 * 5, dtype=np.uint8).reshape(5, 6)
    rng = np.random.RandomState(0)
    corners = [int(np.asarray(ours.random_crop(Image.fromarray(pixels), 3, rng))[0, 0]) for _ in range(600)]
    expected = {row * 6 + column for row in range(3) for column in range(4)}
    assert set(corners) == expected
    assert np.bincount(corners)[sorted(expected)].min() > 25  # 50 each


def test_flip() -> None:
    image = noise(9, 7)
    rng = np.random.RandomState(0)
    flipped = [not same(ours.random_flip(image, rng), image) for _ in range(1000)]
    assert 440 < sum(flipped) < 560
    mirror = next(made for made in (ours.random_flip(image, rng) for _ in range(20)) if not same(made, image))
    assert same(mirror, peer_functions.hflip(image))
