"""Small data sets on disk in the formats of the real ones."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

# Real names of ImageNet's classes (WordNet 3.0): tench, goldfish, great white shark, ...
IMAGENET_CLASSES = (
    "n01440764",
    "n01443537",
    "n01484850",
    "n01491361",
    "n01494475",
    "n01496331",
    "n01498041",
    "n01514668",
)
SIZES = [(500, 375), (375, 500), (500, 333), (400, 400)]  # width, height: what most of ImageNet's photographs have


def make_imagenet_tree(root: Path, *, classes: int = 4, per_class: int = 16, val_per_class: int = 4) -> Path:
    """Write JPEG images in ImageNet's layout, ``{train,val}/nXXXXXXXX/*.JPEG``, and return ``root``.

    Every class has a colour of its own under smooth random blobs, so that a small network tells them apart in a few
    steps. An image takes about 2 ms and 12 kB. The same arguments give the same files.
    """
    if not 1 <= classes <= len(IMAGENET_CLASSES):
        raise ValueError(f"1 to {len(IMAGENET_CLASSES)} classes, got {classes}")
    for split, count in (("train", per_class), ("val", val_per_class)):
        for label, name in enumerate(IMAGENET_CLASSES[:classes]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                stem = f"{name}_{number}" if split == "train" else f"ILSVRC2012_val_{label * count + number + 1:08d}"
                _photograph(label, number, seed=int(split == "val")).save(folder / f"{stem}.JPEG", quality=80)
    return root


def _photograph(label: int, number: int, *, seed: int) -> Image.Image:
    rng = np.random.RandomState([seed, label, number])
    blobs = 0.5 * rng.uniform(0, 255, (9, 12, 3)) + 0.5 * _colour(label)
    return Image.fromarray(blobs.astype(np.uint8)).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)


@functools.cache
def _colour(label: int) -> np.ndarray:
    return np.random.RandomState(label).uniform(0, 255, 3)
