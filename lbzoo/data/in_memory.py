"""Data sets that fit in memory: a micro-batch is one gather from each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lbzoo.data.base import SampleKey

if TYPE_CHECKING:
    from torch import Tensor


class TensorSamples:
    """Samples that are the rows of tensors of one length, such as images and labels.

    ``samples[key]`` is a tuple with a row of each; ``samples.__getitems__(keys)`` is a finished micro-batch, in which
    nothing is left to collate (``as_batch``).
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, key: SampleKey | int) -> tuple[Tensor, ...]:
        row = _row(key)
        return tuple(tensor[row] for tensor in self.tensors)

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> tuple[Tensor, ...]:
        rows = [_row(key) for key in keys]
        return tuple(tensor[rows] for tensor in self.tensors)


def as_batch(batch: Any) -> Any:
    """The ``collate`` of a data set whose ``__getitems__`` makes whole micro-batches."""
    return batch


def _row(key: SampleKey | int) -> int:
    return key.index if isinstance(key, SampleKey) else key
