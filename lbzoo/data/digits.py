"""scikit-learn's digits: real images that come with a library, for runs of seconds."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.extras import extra
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.data.rng import stable_rng
from lbzoo.errors import UsageError
from lbzoo.registry import register_data

if TYPE_CHECKING:
    from torch import Tensor

NUM_CLASSES = 10
NUM_TRAIN, NUM_VAL = 1437, 360  # four fifths and one fifth of 1797
# The split is the same for every run, whatever its seed, so that runs can be compared.
SPLIT_SEED = 0


@register_data("digits")
class Digits(DataSource):
    """1797 scans of handwritten digits (scikit-learn, embedded), 8x8 pixels enlarged to image_size, one channel.

    A micro-batch is (images [N, 1, H, W] float32, normalised; labels [N] int64). Validation holds 36 images of each
    digit.
    """

    in_memory = True
    collate = staticmethod(as_batch)

    def __init__(self, *, image_size: int = 32) -> None:
        if image_size < 8:
            raise UsageError(f"data digits: image_size must be at least 8, the size of the scans, got {image_size}")
        self.image_size = image_size

    def facts(self) -> DataFacts:
        return DataFacts(NUM_TRAIN, NUM_VAL, NUM_CLASSES, (1, self.image_size, self.image_size), "images")

    def prepare(self) -> None:
        """Nothing can be missing: the scans are part of scikit-learn."""

    def train_dataset(self, *, seed: int = 0) -> TensorSamples:
        return self._splits[0]

    def val_dataset(self) -> TensorSamples:
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[TensorSamples, TensorSamples]:
        import torch

        scans, labels = _load_scans()
        images = torch.nn.functional.interpolate(scans, size=self.image_size, mode="bilinear", align_corners=False)
        held_out = _held_out(labels)
        train = images[~held_out]
        images = (images - train.mean()) / train.std()
        return (
            TensorSamples(images[~held_out], labels[~held_out]),
            TensorSamples(images[held_out], labels[held_out]),
        )


def _load_scans() -> tuple[Tensor, Tensor]:
    """(scans [1797, 1, 8, 8] float32 from 0 to 1, labels [1797])."""
    import torch

    with extra("vision"):
        from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)


def _held_out(labels: Tensor) -> Tensor:
    """Which images are for validation: as many of each class."""
    import torch

    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        members = torch.nonzero(labels == digit).squeeze(1)
        order = torch.from_numpy(stable_rng(SPLIT_SEED, digit).permutation(len(members)))
        held_out[members[order[: NUM_VAL // NUM_CLASSES]]] = True
    return held_out
