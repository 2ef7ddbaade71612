"""Images that cannot be read: replaced, counted once over all loader processes, and an error when they are too many."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from data_factories import make_imagenet_tree

from lbzoo.data.imagenet import ImageNet
from lbzoo.data.loader import train_loader, val_loader
from lbzoo.data.unreadable import Unreadable
from lbzoo.errors import DataError

SIZES = {"global_batch_size": 8, "micro_batch_size": 4}


class Files:
    """A hundred images, of which some are broken; remembers what was opened."""

    def __init__(self, bad: set[int], allowed: float = 0.05) -> None:
        self.bad, self.opened = bad, list[int]()
        self.unreadable = Unreadable(100, allowed, lambda index: Path(f"{index}.jpeg"))

    def read(self, index: int) -> int:
        image, used = self.unreadable.read(index, self.decode)
        assert image == used
        return used

    def decode(self, path: Path) -> int:
        index = int(path.stem)
        self.opened.append(index)
        if index in self.bad:
            raise OSError("truncated")
        return index


def test_the_next_readable_one_in_the_order_of_the_files() -> None:
    files = Files({3, 4, 99})
    assert [files.read(index) for index in (2, 3, 4, 99)] == [2, 5, 5, 0]
    assert files.unreadable.indices() == [3, 4, 99]


def test_a_broken_file_is_opened_and_counted_once() -> None:
    files = Files({3, 4})
    for _ in range(3):
        files.read(3)
    assert files.opened == [3, 4, 5, 5, 5]
    assert len(files.unreadable) == 2


def test_the_order_of_reading_does_not_matter() -> None:
    bad = {7, 8, 20}
    one, two = Files(bad), Files(bad)
    assert [one.read(index) for index in range(100)] == [two.read(index) for index in reversed(range(100))][::-1]


def test_more_than_the_allowed_part_is_an_error() -> None:
    files = Files({10, 20, 30, 40, 50, 60})
    for index in (10, 20, 30, 40, 50):
        files.read(index)
    with pytest.raises(DataError, match=r"cannot read the image 60.jpeg: truncated; with it 6 of 100 images") as caught:
        files.read(60)
    assert "more than the 5.00% that data.max_unreadable allows" in str(caught.value)


def test_each_rank_meets_its_share() -> None:
    files = Files({10, 20})
    files.unreadable.ranks = 4
    files.read(10)
    with pytest.raises(DataError, match=r"with it 2 of 25 of this rank's images cannot be read, more than the 5.00%"):
        files.read(20)


def test_none_allowed_and_none_left() -> None:
    with pytest.raises(DataError, match=r"cannot read the image 3.jpeg: truncated; replace the file"):
        Files({3}, allowed=0.0).read(3)
    with pytest.raises(DataError, match="none of the 100 images can be read"):
        Files(set(range(100)), allowed=1.0).read(3)


def test_other_errors_are_not_the_images() -> None:
    def decode(path: Path) -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        Unreadable(10, 0.5, lambda index: Path("a")).read(0, decode)


@pytest.fixture
def source(tmp_path: Path) -> ImageNet:
    make_imagenet_tree(tmp_path, classes=2, per_class=12, val_per_class=4)
    return ImageNet(root=str(tmp_path), image_size=32, resize_size=40, max_unreadable=0.15)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_keep_their_size_and_processes_count_together(source: ImageNet, num_workers: int) -> None:
    samples = source.train_dataset()
    for index in (0, 13, 23):
        samples.files.path(index).write_bytes(b"not an image")
    source.val_dataset().files.path(2).unlink()
    batches = list(train_loader(source, **SIZES, steps=9, seed=0, num_workers=num_workers))  # three epochs
    assert [len(images) for images, _ in batches] == [4] * 18
    training, validation = samples.faults
    assert training.indices() == [0, 13, 23]
    shown = list(val_loader(source, micro_batch_size=4, num_workers=num_workers))
    assert sum(len(labels) for _, labels in shown) == 8
    assert validation.indices() == [2]


def test_the_same_batches_with_any_number_of_processes(source: ImageNet) -> None:
    for index in (5, 6):
        source.train_dataset().files.path(index).write_bytes(b"")
    alone, helped = (
        [images for images, _ in train_loader(source, **SIZES, steps=3, seed=0, num_workers=workers)]
        for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_too_many_end_the_run_from_a_loader_process(source: ImageNet) -> None:
    samples = source.train_dataset()
    for index in range(4):
        samples.files.path(index).write_bytes(b"")
    with pytest.raises(DataError, match="with it 4 of 24 images cannot be read"):
        list(train_loader(source, **SIZES, steps=3, seed=0, num_workers=1))


def test_each_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    files = Files({3, 9})
    with caplog.at_level(logging.WARNING, logger="lbzoo.data.unreadable"):
        files.read(3)
        files.read(3)
        files.read(9)
    assert [record.getMessage() for record in caplog.records] == [
        "unreadable image number 1, replaced by the next: 3.jpeg: truncated",
        "unreadable image number 2, replaced by the next: 9.jpeg: truncated",
    ]
