"""The benchmark of image input: what it generates, that both loaders do the work, what the result says."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import image_input
from image_input import Loading
from timing import Timing


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Loading:
    root = tmp_path_factory.mktemp("images")
    image_input.write_images(root, 8, distinct=2)
    return Loading(root, images=8, batch_size=4, workers=0, device=torch.device("cpu"))


def test_images_have_the_size_of_imagenets() -> None:
    content = image_input.jpeg(0)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.size, image.mode, image.format) == ((500, 375), "RGB", "JPEG")
    assert 90_000 < len(content) < 130_000


@pytest.mark.parametrize("loader", [image_input.ours, image_input.timms])
def test_both_loaders_give_the_same_batches_of_bytes(loading: Loading, loader) -> None:
    batches = list(loader(loading))
    assert [(images.shape, images.dtype) for images, _ in batches] == [((4, 3, 224, 224), torch.uint8)] * 2
    assert sorted(int(label) for _, labels in batches for label in labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    image_input.consume(loader(loading), loading, None)


def test_the_parts_are_all_there(loading: Loading) -> None:
    spent = image_input.parts(loading)
    assert list(spent) == ["read", "decode", "random numbers", "crop and scale", "mirror", "to an array", "collate"]


def test_a_table_compares_with_timm() -> None:
    timings = {"lbzoo": Timing([0.5, 0.4, 0.6]), "timm": Timing([1.0, 1.0, 1.0])}
    lines = list(image_input.table("One core", timings, images=100))
    assert "| lbzoo | 200 | 10.0% | 3 | 2.00 |" in lines
    assert "| timm | 100 | 0.0% | 3 | 1.00 |" in lines
    lines = list(image_input.table("One core", {"lbzoo": Timing(), "timm": Timing([1.0])}, images=100))
    assert lines[-2] == "Not measured: the cores were never idle long enough."
