"""MNIST from the files that torchvision keeps it in."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.idx_files import find_idx, read_idx
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.data.locations import data_folder, looking_at, unusable
from lbzoo.data.small_images import as_samples
from lbzoo.errors import DataError
from lbzoo.registry import register_data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Images = NDArray[np.uint8]

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 60_000, 10_000, 10
IMAGE_SIZE = 28
ROOT_VARIABLE = "LBZOO_MNIST"
# Of the 60,000 training images, pixels from 0 to 1.
PIXEL_MEAN, PIXEL_STD = (0.1307,), (0.3081,)
SPLITS = ("train", "t10k")


@register_data("mnist")
class Mnist(DataSource):
    """MNIST, 70,000 handwritten digits of 28x28 pixels, from ``MNIST/raw`` under ``root`` or $LBZOO_MNIST.

    A micro-batch is (images [N, 1, 28, 28] uint8; labels [N] int64); tasks normalise it on the device. There is no
    augmentation.
    """

    in_memory = True
    collate = staticmethod(as_batch)

    def __init__(self, *, root: str | None = None) -> None:
        self.root = root
        self._counts = (NUM_TRAIN, NUM_VAL)

    def facts(self) -> DataFacts:
        shape = (1, IMAGE_SIZE, IMAGE_SIZE)
        return DataFacts(*self._counts, NUM_CLASSES, shape, "images", pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)

    def prepare(self) -> None:
        train, val = self._splits
        self._counts = len(train), len(val)

    def train_dataset(self, *, seed: int = 0) -> TensorSamples:
        return self._splits[0]

    def val_dataset(self) -> TensorSamples:
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[TensorSamples, TensorSamples]:
        """Both splits; all that is wrong with any of the four files is one error."""
        root = data_folder(self.root, ROOT_VARIABLE, _HOW_TO_GET_IT)
        problems: list[str] = []
        with looking_at(f"MNIST in {root}", _HOW_TO_GET_IT):
            folder = root if find_idx(root, f"{SPLITS[0]}-images-idx3-ubyte") else root / "MNIST" / "raw"
            if not folder.is_dir():
                raise unusable(f"MNIST in {root}", ["MNIST/raw: no such folder"], _HOW_TO_GET_IT)
            train, val = (_read_split(folder, split, problems) for split in SPLITS)
        if train is None or val is None:
            raise unusable(f"MNIST in {folder}", problems, _HOW_TO_GET_IT)
        return train, val


_HOW_TO_GET_IT = f"""\
Set data.root=FOLDER, or {ROOT_VARIABLE}=FOLDER in the environment, to a folder with the files, packed (.gz) or not,
  FOLDER/MNIST/raw/train-images-idx3-ubyte   FOLDER/MNIST/raw/train-labels-idx1-ubyte
  FOLDER/MNIST/raw/t10k-images-idx3-ubyte    FOLDER/MNIST/raw/t10k-labels-idx1-ubyte
(the layout of torchvision's MNIST); they are to be had from yann.lecun.com/exdb/mnist and its mirrors."""


def _read_split(folder: Path, split: str, problems: list[str]) -> TensorSamples | None:
    """None where anything is wrong with it, which is added to the problems."""
    import torch

    images = _read(folder, f"{split}-images-idx3-ubyte", problems)
    labels = _read(folder, f"{split}-labels-idx1-ubyte", problems)
    if images is None or labels is None:
        return None
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        problems.append(f"{split}-images-idx3-ubyte: shape {list(images.shape)}, not [N, {IMAGE_SIZE}, {IMAGE_SIZE}]")
    elif labels.shape != images.shape[:1]:
        problems.append(f"{split}: {len(images)} images, but {labels.size} labels")
    elif len(labels) and labels.max() >= NUM_CLASSES:
        problems.append(f"{split}-labels-idx1-ubyte: a label of {labels.max()}, not from 0 to {NUM_CLASSES - 1}")
    else:
        return as_samples(torch.from_numpy(images)[..., None], torch.from_numpy(labels).long())
    return None


def _read(folder: Path, name: str, problems: list[str]) -> Images | None:
    path = find_idx(folder, name)
    if path is None:
        problems.append(f"{name}: no such file, nor {name}.gz")
        return None
    try:
        return read_idx(path)
    except DataError as error:
        problems.append(f"{path.name}: {error}")
        return None
