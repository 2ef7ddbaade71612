"""CIFAR-10 from the files that torchvision keeps it in."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.cifar_files import FOLDER, NUM_CLASSES, TRAIN_FILES, VAL_FILES, Batch, read_batch
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.data.locations import data_folder, looking_at, unusable
from lbzoo.data.small_images import Augmentation, AugmentedImages, as_samples
from lbzoo.errors import DataError, UsageError
from lbzoo.registry import register_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NUM_TRAIN, NUM_VAL = 50_000, 10_000
IMAGE_SIZE = 32
ROOT_VARIABLE = "LBZOO_CIFAR10"
# Of the 50,000 training images, pixels from 0 to 1.
PIXEL_MEAN = (0.4914, 0.4822, 0.4465)
PIXEL_STD = (0.2470, 0.2435, 0.2616)


@register_data("cifar10")
class Cifar10(DataSource):
    """CIFAR-10, 60,000 images of 32x32 pixels, from ``cifar-10-batches-py`` under ``root`` or $LBZOO_CIFAR10.

    A micro-batch is (images [N, 3, 32, 32] uint8, channels-last; labels [N] int64); tasks normalise it on the device.

    Training images are padded by ``pad`` pixels, of the mean colour or a reflection (``pad_with``), cropped to their
    size at a random place, and mirrored at random (``flip``), as He et al. 2015 do; ``cutout`` covers a square of so
    many pixels, at a random place, with the mean colour.
    """

    in_memory = True
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        root: str | None = None,
        pad: int = 4,
        pad_with: Literal["mean", "reflection"] = "mean",
        flip: bool = True,
        cutout: int = 0,
    ) -> None:
        for name, pixels in {"pad": pad, "cutout": cutout}.items():
            if not 0 <= pixels < IMAGE_SIZE:
                raise UsageError(f"data cifar10: {name} is a number of pixels from 0 to {IMAGE_SIZE - 1}, got {pixels}")
        self.root = root
        fill = tuple(round(255 * mean) for mean in PIXEL_MEAN)
        self.augmentation = Augmentation(pad, "fill" if pad_with == "mean" else "reflection", flip, cutout, fill)
        self._counts = (NUM_TRAIN, NUM_VAL)

    def facts(self) -> DataFacts:
        shape = (3, IMAGE_SIZE, IMAGE_SIZE)
        return DataFacts(*self._counts, NUM_CLASSES, shape, "images", pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)

    def prepare(self) -> None:
        self._counts = len(self._splits[0][1]), len(self._splits[1][1])

    def train_dataset(self, *, seed: int = 0) -> AugmentedImages:
        return AugmentedImages(*self._splits[0], self.augmentation, seed=seed)

    def val_dataset(self) -> TensorSamples:
        return as_samples(*self._splits[1])

    @cached_property
    def _splits(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(images [N, 32, 32, 3], labels [N]) for training and validation. All that is wrong with them is one error."""
        root = data_folder(self.root, ROOT_VARIABLE, _HOW_TO_GET_IT)
        with looking_at(f"CIFAR-10 in {root}", _HOW_TO_GET_IT):
            folder = root if (root / TRAIN_FILES[0]).is_file() else root / FOLDER
            if not folder.is_dir():
                problem = f"{FOLDER}: no such folder{_what_is_there_instead(root)}"
                raise unusable(f"CIFAR-10 in {root}", [problem], _HOW_TO_GET_IT)
        problems: list[str] = []
        train, val = _read(folder, TRAIN_FILES, problems), _read(folder, VAL_FILES, problems)
        if problems:
            raise unusable(f"CIFAR-10 in {folder}", problems, _HOW_TO_GET_IT)
        return _joined(train), _joined(val)


_HOW_TO_GET_IT = f"""\
Set data.root=FOLDER, or {ROOT_VARIABLE}=FOLDER in the environment, to a folder with the files
  FOLDER/{FOLDER}/data_batch_1 to data_batch_5   FOLDER/{FOLDER}/test_batch
(the layout of torchvision's CIFAR10): cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html, unpacked."""


def _read(folder: Path, names: Sequence[str], problems: list[str]) -> list[Batch]:
    batches = []
    for name in names:
        try:
            batches.append(read_batch(folder / name))
        except DataError as error:
            problems.append(f"{name}: {error}")
    return batches


def _joined(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    import numpy as np
    import torch

    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _what_is_there_instead(root: Path) -> str:
    """The ways in which the original archives are left half unpacked, or are the wrong ones."""
    if (root / "cifar-10-python.tar.gz").is_file():
        return ", but its archive: unpack cifar-10-python.tar.gz"
    if (root / "cifar-10-batches-bin").is_dir():
        return ", but cifar-10-batches-bin, the version for C programs: get the one for Python"
    if (root / "cifar-100-python").is_dir():
        return ", but cifar-100-python, which is another data set"
    return ""
