"""Small images that fit in memory as bytes: a micro-batch is cut out, mirrored and covered in a few array operations.

What is random in an image is a function of (seed, index, epoch), as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lbzoo.data.base import SampleKey
from lbzoo.data.in_memory import TensorSamples
from lbzoo.data.rng import stable_uniform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# Sets these random numbers apart from those of other parts of a run.
_AUGMENTATION = 1


@dataclass(frozen=True)
class Augmentation:
    """Pad by ``pad`` pixels and crop to the old size at a random place; mirror at random; cover a square.

    The frame is of the ``fill`` colour, which is also that of the square of ``cutout`` pixels, or a reflection of the
    image. The square lies inside the image (Page, "How to train your ResNet", 2018).
    """

    pad: int
    pad_with: Literal["fill", "reflection"]
    flip: bool
    cutout: int
    fill: tuple[int, ...]  # of each channel, 0 to 255


def as_samples(images: Tensor, labels: Tensor) -> TensorSamples:
    """Images [N, H, W, C] as they are: micro-batches (images [N, C, H, W] uint8, channels-last; labels [N])."""
    return TensorSamples(images.permute(0, 3, 1, 2), labels)


class AugmentedImages:
    """Training images [N, H, W, C] uint8 by SampleKey; micro-batches as those of :func:`as_samples`, augmented."""

    def __init__(self, images: Tensor, labels: Tensor, augmentation: Augmentation, *, seed: int) -> None:
        self.images, self.labels = images, labels
        self.augmentation, self.seed = augmentation, seed
        self._framed = _framed(images.numpy(), augmentation)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        import numpy as np
        import torch

        augmentation = self.augmentation
        index, epoch = np.asarray(keys, dtype=np.int64).T
        _, height, width, channels = self.images.shape
        draws = stable_uniform(self.seed, index, epoch, _AUGMENTATION, np.arange(5)[:, None])
        top, left, mirrored, cut_top, cut_left = draws
        images = np.empty((len(keys), height, width, channels), np.uint8)
        corners = zip(*(_places(place, 2 * augmentation.pad).tolist() for place in (top, left)), strict=True)
        # A copy of 32 rows each is five times faster than one gather of all pixels.
        for image, sample, (y, x) in zip(images, index.tolist(), corners, strict=True):
            image[:] = self._framed[sample, y : y + height, x : x + width]
        if augmentation.flip:
            chosen = mirrored < 0.5
            images[chosen] = images[chosen][:, :, ::-1]
        if augmentation.cutout:
            covered_rows = _covered(cut_top, height, augmentation.cutout)
            covered_columns = _covered(cut_left, width, augmentation.cutout)
            images[covered_rows[:, :, None] & covered_columns[:, None, :]] = augmentation.fill
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[torch.from_numpy(index)]

    def unaugmented(self) -> TensorSamples:
        """The same images by int, as a validation set gives its own."""
        return as_samples(self.images, self.labels)


def _framed(images: NDArray[np.uint8], augmentation: Augmentation) -> NDArray[np.uint8]:
    """The images [N, H, W, C] with ``pad`` pixels more on each side."""
    import numpy as np

    pad = augmentation.pad
    if not pad:
        return images
    if augmentation.pad_with == "reflection":
        return np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    count, height, width, channels = images.shape
    framed = np.empty((count, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    framed[:] = augmentation.fill
    framed[:, pad:-pad, pad:-pad] = images
    return framed


def _places(uniform: NDArray[np.float64], largest: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to ``largest``, equally likely."""
    return (uniform * (largest + 1)).astype("int64")


def _covered(uniform: NDArray[np.float64], size: int, cutout: int) -> NDArray[np.bool_]:
    """[N, size]: which rows (or columns) a stretch of ``cutout`` covers that lies at a random place."""
    import numpy as np

    first = _places(uniform, size - cutout)[:, None]
    return (np.arange(size) >= first) & (np.arange(size) < first + cutout)
