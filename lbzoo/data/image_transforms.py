"""Crops and flips of PIL images whose randomness is handed in, so that an image is augmented the same everywhere.

They follow torchvision's transforms pixel for pixel (tests/data/test_image_transforms.py), which draw from the
process's global generator instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

    Rng = np.random.RandomState

# Width over height of the random crops of Szegedy et al. 2015.
ASPECT_RATIOS = (3 / 4, 4 / 3)


def resize_shorter_side(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Scale the image so that its shorter side is ``size`` pixels."""
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    return image.resize((size, longer) if width <= height else (longer, size), resample)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of ``size`` pixels in the middle."""
    width, height = image.size
    return _crop(image, round((width - size) / 2), round((height - size) / 2), size, size)


def random_crop(image: Image.Image, size: int, rng: Rng) -> Image.Image:
    """A square of ``size`` pixels at a random place."""
    width, height = image.size
    return _crop(image, rng.randint(width - size + 1), rng.randint(height - size + 1), size, size)


def random_resized_crop(
    image: Image.Image, size: int, rng: Rng, *, area: tuple[float, float], resample: Image.Resampling
) -> Image.Image:
    """A random rectangle that covers a part of the image between the two ``area`` fractions, scaled to a square."""
    left, top, width, height = random_rectangle(*image.size, rng, area=area)
    return _crop(image, left, top, width, height).resize((size, size), resample)


def random_rectangle(width: int, height: int, rng: Rng, *, area: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a rectangle in an image: area uniform, aspect ratio log-uniform in ASPECT_RATIOS.

    Where ten draws do not fit into the image, the largest rectangle in its middle that has an allowed aspect ratio.
    """
    narrowest, widest = ASPECT_RATIOS
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(width - w + 1), rng.randint(height - h + 1), w, h
    w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
    return (width - w) // 2, (height - h) // 2, w, h


def random_flip(image: Image.Image, rng: Rng) -> Image.Image:
    """The image, or its mirror image, with equal chances."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random_sample() < 0.5 else image


def _crop(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))
