"""Loaders: the same micro-batches with any number of processes and ranks, errors as they were raised."""

from __future__ import annotations

import os
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from data_factories import make_imagenet_tree

from lbzoo.data.digits import Digits
from lbzoo.data.imagenet import ImageNet
from lbzoo.data.loader import default_workers, train_loader, val_loader
from lbzoo.data.synthetic_images import SyntheticImages
from lbzoo.errors import DataError

SIZES = {"global_batch_size": 8, "micro_batch_size": 2}


@pytest.fixture
def images(tmp_path: Path) -> ImageNet:
    make_imagenet_tree(tmp_path / "images", classes=3, per_class=6, val_per_class=3)
    return ImageNet(root=str(tmp_path / "images"), image_size=32, resize_size=40)


def equal(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_loader_processes_change_nothing(images: ImageNet) -> None:
    alone = list(train_loader(images, **SIZES, steps=6, seed=3, num_workers=0))
    helped = list(train_loader(images, **SIZES, steps=6, seed=3, num_workers=2))
    assert len(alone) == 6 * 4
    assert equal(alone, helped)
    assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in helped)
    assert not equal(alone, list(train_loader(images, **SIZES, steps=6, seed=4, num_workers=0)))


def test_ranks_and_resumes_share_the_batches_of_one_process(images: ImageNet) -> None:
    """Six steps are more than two epochs of 18 images, so that augmentation and order both change on the way."""
    alone = list(train_loader(images, **SIZES, steps=6, seed=3, num_workers=0))
    ranks = [
        list(train_loader(images, **SIZES, steps=6, start_step=2, seed=3, rank=rank, world_size=2, num_workers=0))
        for rank in range(2)
    ]
    for step in range(2, 6):
        together = [batch for batches in ranks for batch in batches[2 * (step - 2) : 2 * (step - 1)]]
        assert equal(alone[4 * step : 4 * (step + 1)], together)


def test_a_loader_can_be_run_twice(images: ImageNet) -> None:
    loader = train_loader(images, **SIZES, steps=2, seed=3, num_workers=1)
    assert equal(list(loader), list(loader))


@pytest.mark.parametrize("world_size", [1, 2])
def test_validation_shows_everything_once(images: ImageNet, world_size: int) -> None:
    loaders = [
        val_loader(images, micro_batch_size=2, rank=rank, world_size=world_size, num_workers=0)
        for rank in range(world_size)
    ]
    labels = sorted(label for loader in loaders for _, batch in loader for label in batch.tolist())
    assert labels == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_arrives_as_it_was_raised(images: ImageNet, num_workers: int) -> None:
    path = images.train_dataset().files.path(7)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError) as caught:
        list(train_loader(images, **SIZES, steps=9, seed=3, num_workers=num_workers))
    assert str(caught.value).startswith(f"cannot read the image {path}: ")
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).endswith("the files are damaged, or not where they seem to be")


def test_closing_ends_the_processes(images: ImageNet) -> None:
    """At any place; and they do not end by themselves with the main process, since they ignore SIGTERM."""
    loader = train_loader(images, **SIZES, steps=2, seed=3, num_workers=2)
    batches = list(loader)
    for take in (0, 3, 8):
        rest = iter(loader)
        assert equal([next(rest) for _ in range(take)], batches[:take])
        loader.close()
        assert not active_children()
    assert equal(list(loader), batches)
    loader.close()
    loader.close()
    assert not active_children()


def test_loaders_say_how_many_ranks_share_the_unreadable_images(images: ImageNet) -> None:
    loaders = (
        train_loader(images, **SIZES, steps=1, seed=3, rank=1, world_size=2, num_workers=0),
        val_loader(images, micro_batch_size=2, rank=1, world_size=2, num_workers=0),
    )
    assert [faults.ranks for loader in loaders for faults in loader.dataset.faults] == [2, 2, 2]


def test_the_global_generator_is_the_models(images: ImageNet) -> None:
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(train_loader(images, **SIZES, steps=1, seed=3, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_in_memory_comes_in_whole_batches() -> None:
    digits = Digits(image_size=8)
    loader = train_loader(digits, global_batch_size=64, micro_batch_size=32, steps=3, seed=0)
    batches = list(loader)
    assert loader.num_workers == 0
    assert [tuple(image.shape) for image, _ in batches] == [(32, 1, 8, 8)] * 6
    keys = list(loader.batch_sampler)
    train = digits.train_dataset()
    for (images, labels), batch in zip(batches, keys, strict=True):
        assert torch.equal(images, torch.stack([train[key][0] for key in batch]))
        assert labels.tolist() == [int(train[key][1]) for key in batch]


def test_synthetic_images_look_like_imagenets() -> None:
    source = SyntheticImages(image_size=16, num_classes=7, num_val=5)
    source.prepare()
    loader = train_loader(source, global_batch_size=6, micro_batch_size=3, steps=400, start_step=398, seed=1)
    images, labels = next(iter(loader))
    assert images.shape == (3, *source.facts().input_shape) == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= int(labels.min()) <= int(labels.max()) < 7
    assert sum(len(batch) for _, batch in val_loader(source, micro_batch_size=2)) == 5
    assert equal([list(batch) for batch in loader], [list(batch) for batch in loader])


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_workers(ImageNet()) == min(cores, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert default_workers(ImageNet()) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(8 * cores))
    assert default_workers(ImageNet()) == 1
    assert default_workers(Digits()) == 0
