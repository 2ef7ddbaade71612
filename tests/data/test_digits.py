"""Digits: the facts hold, the split is fair, a micro-batch is what its rows are."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from lbzoo.data.base import SampleKey
from lbzoo.data.digits import Digits
from lbzoo.errors import UsageError


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_facts_hold(digits: Digits) -> None:
    digits.prepare()
    facts, train, val = digits.facts(), digits.train_dataset(), digits.val_dataset()
    assert (len(train), len(val)) == (facts.num_train, facts.num_val) == (1437, 360)
    image, label = train[SampleKey(0, 0)]
    assert image.shape == facts.input_shape == (1, 32, 32)
    assert image.dtype == torch.float32
    assert set(train.tensors[1].tolist()) == set(range(facts.num_classes)) == set(range(10))
    assert label.dtype == torch.int64


def test_split_is_stratified_and_complete(digits: Digits) -> None:
    train, val = digits.train_dataset(), digits.val_dataset()
    assert torch.bincount(val.tensors[1]).tolist() == [36] * 10
    labels = torch.cat([train.tensors[1], val.tensors[1]])
    assert torch.bincount(labels).tolist() == torch.bincount(torch.tensor(load_digits().target)).tolist()


def test_every_scan_is_in_one_split() -> None:
    """At the scans' own size enlarging does nothing, so that up to normalisation the pixels are scikit-learn's."""
    digits = Digits(image_size=8)
    images = torch.cat([digits.train_dataset().tensors[0], digits.val_dataset().tensors[0]]).squeeze(1)
    scans = torch.tensor(load_digits().images, dtype=torch.float32)
    steps = (images - images.min()) / (images.max() - images.min()) * 16
    ours = sorted(tuple(image) for image in steps.round().int().flatten(1).tolist())
    assert ours == sorted(tuple(scan) for scan in scans.int().flatten(1).tolist())
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_labels_belong_to_the_images() -> None:
    """The mean image of each class is nearest to most of that class's held-out images."""
    digits = Digits(image_size=8)
    (images, labels), (val_images, val_labels) = digits.train_dataset().tensors, digits.val_dataset().tensors
    means = torch.stack([images[labels == digit].mean(0).flatten() for digit in range(10)])
    nearest = torch.cdist(val_images.flatten(1), means).argmin(1)
    assert (nearest == val_labels).float().mean() > 0.85


def test_normalised_by_the_training_images(digits: Digits) -> None:
    images = digits.train_dataset().tensors[0]
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-4)


def test_a_micro_batch_is_its_rows(digits: Digits) -> None:
    train = digits.train_dataset(seed=1)
    keys = [SampleKey(index, epoch) for index, epoch in ((3, 0), (1000, 1), (3, 2))]
    images, labels = digits.collate(train.__getitems__(keys))
    for row, key in enumerate(keys):
        assert torch.equal(images[row], train[key][0])
        assert labels[row] == train[key][1]


def test_every_construction_gives_the_same_data(digits: Digits) -> None:
    for ours, theirs in zip(digits.train_dataset(seed=1).tensors, Digits().train_dataset(seed=2).tensors, strict=True):
        assert torch.equal(ours, theirs)


def test_image_size() -> None:
    assert Digits(image_size=20).facts().input_shape == (1, 20, 20)
    assert Digits(image_size=20).val_dataset()[7][0].shape == (1, 20, 20)
    with pytest.raises(UsageError, match="image_size must be at least 8"):
        Digits(image_size=7)
