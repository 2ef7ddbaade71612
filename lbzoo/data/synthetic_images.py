"""Synthetic images: random pixels, to measure throughput and to try a recipe where its data is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbzoo.data.base import DataFacts, DataSource, SampleKey
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.errors import UsageError
from lbzoo.registry import register_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DISTINCT_IMAGES = 256


@register_data("synthetic_images")
class SyntheticImages(DataSource):
    """Random pixels in ImageNet's sizes (synthetic): no files, and nothing to learn but 256 images by heart.

    A micro-batch is (images [N, C, H, W] uint8, channels-last; labels [N] int64), as ``imagenet`` gives it.
    """

    in_memory = True
    preshuffled = True
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        num_train: int = 1_281_167,
        num_val: int = 50_000,
        num_classes: int = 1000,
        image_size: int = 224,
        channels: int = 3,
    ) -> None:
        sizes = {"num_train": num_train, "num_val": num_val, "num_classes": num_classes, "image_size": image_size}
        for name, size in {**sizes, "channels": channels}.items():
            if size < 1:
                raise UsageError(f"data synthetic_images: {name} must be at least 1, got {size}")
        self._facts = DataFacts(num_train, num_val, num_classes, (channels, image_size, image_size), "images")

    def facts(self) -> DataFacts:
        return self._facts

    def prepare(self) -> None:
        """Nothing can be missing."""

    def train_dataset(self, *, seed: int = 0) -> TensorSamples:
        return self._samples(self._facts.num_train, seed)

    def val_dataset(self) -> TensorSamples:
        return self._samples(self._facts.num_val, 0)

    def _samples(self, length: int, seed: int) -> TensorSamples:
        import torch

        assert self._facts.input_shape is not None
        assert self._facts.num_classes is not None
        channels, height, width = self._facts.input_shape
        generator = torch.Generator().manual_seed(seed)
        distinct = min(length, DISTINCT_IMAGES)
        pixels = torch.randint(256, (distinct, height, width, channels), dtype=torch.uint8, generator=generator)
        labels = torch.arange(distinct) % self._facts.num_classes
        return _Repeated(length, pixels.permute(0, 3, 1, 2), labels)


class _Repeated(TensorSamples):
    """``length`` samples that are the rows of shorter tensors over and over."""

    def __init__(self, length: int, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> tuple[Tensor, ...]:
        distinct = len(self.tensors[0])
        return super().__getitems__([(key.index if isinstance(key, SampleKey) else key) % distinct for key in keys])
