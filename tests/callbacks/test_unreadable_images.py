"""The file that names unreadable images: each once, across validations, resumes and errors."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from plain_trainer import Plain, adamw, data, fit

from lbzoo.callbacks.trainer_view import TrainerView
from lbzoo.callbacks.unreadable_images import UnreadableImages
from lbzoo.data.unreadable import Unreadable

NAMES = [f"/images/{number}.jpeg" for number in range(20)]


def faults() -> Unreadable:
    return Unreadable(len(NAMES), 0.9, lambda index: Path(NAMES[index]))


def meet(unreadable: Unreadable, *indices: int) -> None:
    """Read these images, which cannot be read."""
    for wanted in indices:

        def decode(path: Path, wanted: int = wanted) -> None:
            if path == Path(NAMES[wanted]):
                raise OSError("truncated")

        unreadable.read(wanted, decode)


def trainer(folder: Path, *parts: Unreadable) -> TrainerView:
    dataset = SimpleNamespace(faults=parts)
    return cast(TrainerView, SimpleNamespace(train_dataloader=SimpleNamespace(dataset=dataset),
                                             default_root_dir=str(folder)))  # fmt: skip


def lines(folder: Path) -> list[str]:
    return (folder / "unreadable_images.txt").read_text().splitlines()


def test_each_image_is_named_once_and_at_once(tmp_path: Path) -> None:
    training, validation = faults(), faults()
    view, callback, module = trainer(tmp_path, training, validation), UnreadableImages(), cast(Any, None)
    callback.on_train_start(view, module)
    callback.on_train_batch_end(view, module, None, None, 0)
    assert not list(tmp_path.iterdir()), "no file where all is well"
    meet(training, 3)
    callback.on_train_batch_end(view, module, None, None, 1)
    assert lines(tmp_path) == [NAMES[3]]
    meet(training, 3, 1)
    meet(validation, 7)
    callback.on_validation_end(view, module)
    assert lines(tmp_path) == [NAMES[3], NAMES[1], NAMES[7]]
    callback.on_train_end(view, module)
    assert len(lines(tmp_path)) == 3


def test_a_resumed_run_goes_on_with_the_file(tmp_path: Path) -> None:
    for met in ((2, 5), (5, 9)):
        unreadable = faults()
        view, callback = trainer(tmp_path, unreadable), UnreadableImages()
        callback.on_train_start(view, cast(Any, None))
        meet(unreadable, *met)
        callback.on_train_batch_end(view, cast(Any, None), None, None, 0)
    assert lines(tmp_path) == [NAMES[2], NAMES[5], NAMES[9]]


def test_what_ended_the_run_is_named(tmp_path: Path) -> None:
    unreadable = faults()
    view, callback = trainer(tmp_path / "run", unreadable), UnreadableImages(file="bad.txt")
    callback.on_train_start(view, cast(Any, None))
    meet(unreadable, 4)
    callback.on_exception(view, cast(Any, None), RuntimeError("elsewhere"))
    assert (tmp_path / "run" / "bad.txt").read_text() == f"{NAMES[4]}\n"


def test_names_that_are_no_utf_8_are_written_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = b"/images/caf\xe9.jpeg"

    def decode(path: Path) -> int:
        if path.name.startswith("caf"):
            raise OSError("truncated")
        return 0

    for _ in range(2):  # a resumed run reads the file first
        unreadable = Unreadable(2, 0.9, lambda index: Path(os.fsdecode(name) if index else "/images/1.jpeg"))
        view, callback = trainer(tmp_path, unreadable), UnreadableImages()
        callback.on_train_start(view, cast(Any, None))
        unreadable.read(1, decode)
        callback.on_train_batch_end(view, cast(Any, None), None, None, 0)
    assert (tmp_path / "unreadable_images.txt").read_bytes() == name + b"\n"
    assert "/images/caf\\udce9.jpeg" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_lightning_trainer(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    class Images(list[Any]):
        """Some samples are read from files."""

        def __init__(self, samples: Any) -> None:
            super().__init__(samples)
            self.faults = (faults(),)

        def __getitem__(self, index: Any) -> Any:
            if index in (5, 6):
                meet(self.faults[0], index)
            return super().__getitem__(index)

    loader = data()
    images = Images([loader.dataset[index] for index in range(48)])
    loader = type(loader)(images, batch_size=4, num_workers=workers)
    fit(Plain(adamw), UnreadableImages(), loader=loader, default_root_dir=str(tmp_path), max_steps=12)
    assert lines(tmp_path) == [NAMES[5], NAMES[6]]
    assert "2 images could not be read and were replaced; they are named in" in caplog.text
