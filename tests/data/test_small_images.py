"""Augmentation in batches: crops, mirrors and squares against brute force, random numbers by key."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lbzoo.data.base import SampleKey
from lbzoo.data.rng import stable_uniform
from lbzoo.data.small_images import Augmentation, AugmentedImages

NOTHING = Augmentation(pad=0, pad_with="fill", flip=False, cutout=0, fill=(10, 20, 30))
COUNT, SIZE = 6, 8


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """No two pixels of an image are alike."""
    rng = np.random.RandomState(0)
    return torch.from_numpy(np.stack([rng.permutation(200)[: 3 * SIZE * SIZE] for _ in range(COUNT)]).astype(np.uint8)
                            .reshape(COUNT, SIZE, SIZE, 3) + 40)  # fmt: skip


def samples(images: torch.Tensor, seed: int = 0, **changes: object) -> AugmentedImages:
    augmentation = Augmentation(**{**NOTHING.__dict__, **changes})
    return AugmentedImages(images, torch.arange(COUNT), augmentation, seed=seed)


def epochs(augmented: AugmentedImages, index: int, count: int) -> list[torch.Tensor]:
    """The image in so many epochs, [C, H, W]."""
    return list(augmented.__getitems__([SampleKey(index, epoch) for epoch in range(count)])[0])


@pytest.mark.parametrize("pad_with", ["fill", "reflection"])
def test_crops_are_those_of_the_padded_image_and_all_of_them_come(images: torch.Tensor, pad_with: str) -> None:
    pad = 2
    chw = images[1].permute(2, 0, 1).float()
    if pad_with == "reflection":
        padded = F.pad(chw[None], (pad,) * 4, mode="reflect")[0]
    else:
        fill = torch.tensor([10.0, 20.0, 30.0])[:, None, None]
        padded = F.pad(chw - fill, (pad,) * 4) + fill
    places = list(itertools.product(range(2 * pad + 1), repeat=2))
    crops = {place: padded[:, place[0] : place[0] + SIZE, place[1] : place[1] + SIZE].byte() for place in places}
    seen = []
    for image in epochs(samples(images, pad=pad, pad_with=pad_with), 1, 1000):
        (place,) = [place for place, crop in crops.items() if torch.equal(crop, image)]
        seen.append(place)
    assert set(seen) == set(places)
    assert min(seen.count(place) for place in places) > 20  # 40 each


def test_mirrors(images: torch.Tensor) -> None:
    original = images[2].permute(2, 0, 1)
    made = epochs(samples(images, flip=True), 2, 1000)
    mirrored = [torch.equal(image, original.flip(2)) for image in made]
    assert all(mirror or torch.equal(image, original) for mirror, image in zip(mirrored, made, strict=True))
    assert 440 < sum(mirrored) < 560


def test_cutout_is_a_square_of_the_fill_colour_anywhere(images: torch.Tensor) -> None:
    original, fill = images[3].permute(2, 0, 1), torch.tensor([10, 20, 30])[:, None, None]
    corners = set()
    for image in epochs(samples(images, cutout=3), 3, 600):
        covered = (image != original).all(dim=0)
        assert torch.equal(torch.where(covered, fill, original), image)
        rows, columns = covered.any(1).nonzero().flatten(), covered.any(0).nonzero().flatten()
        assert (len(rows), len(columns), int(covered.sum())) == (3, 3, 9)
        corners.add((int(rows[0]), int(columns[0])))
    assert corners == set(itertools.product(range(SIZE - 2), repeat=2))


def test_a_function_of_seed_index_and_epoch(images: torch.Tensor) -> None:
    whole = {"pad": 2, "flip": True, "cutout": 2}
    keys = [SampleKey(index, epoch) for index in range(COUNT) for epoch in range(5)]
    batch, labels = samples(images, **whole).__getitems__(keys)
    assert labels.tolist() == [key.index for key in keys]
    for position in (0, 7, 29):  # alone as in company
        image, label = samples(images, **whole)[keys[position]]
        assert torch.equal(image, batch[position])
        assert label == keys[position].index
    other, _ = samples(images, seed=1, **whole).__getitems__(keys)
    assert sum(torch.equal(a, b) for a, b in zip(batch, other, strict=True)) < 3
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_the_stored_images_are_left_alone(images: torch.Tensor) -> None:
    before = images.clone()
    augmented = samples(images, flip=True, cutout=4)
    epochs(augmented, 0, 50)
    assert torch.equal(images, before)
    plain, labels = augmented.unaugmented().__getitems__([4, 0])
    assert torch.equal(plain, before[[4, 0]].permute(0, 3, 1, 2))
    assert labels.tolist() == [4, 0]


def splitmix(*key: int) -> float:
    """The same hash in Python's integers."""
    mask, state = (1 << 64) - 1, 0
    for part in key:
        state = ((state ^ part) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) / 2**53


def test_uniform_numbers_are_a_hash_of_the_key() -> None:
    made = stable_uniform(42, np.arange(5), np.array([[0], [7]]), 1)
    assert made.shape == (2, 5)
    for row, column in itertools.product(range(2), range(5)):
        assert made[row, column] == splitmix(42, column, (0, 7)[row], 1)
    # SplitMix64's published first output for the seed 0.
    assert stable_uniform(0) == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_uniform_numbers_are_uniform_and_independent() -> None:
    made = stable_uniform(3, np.arange(1000)[:, None], np.arange(40))
    counts = np.histogram(made, bins=100, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 150  # chi-squared of 99 degrees: 1 in 1000 above 149
    for other in (made[:, 1:], made[1:], stable_uniform(4, np.arange(1000)[:, None], np.arange(40))):
        rows, columns = other.shape
        assert abs(np.corrcoef(made[:rows, :columns].ravel(), other.ravel())[0, 1]) < 0.02
