"""Which samples make up a batch: sampling without replacement in shards (LANS section 3.4), the same on any layout.

A global batch of G samples in micro-batches of m is drawn from S = G / m virtual shards, one micro-batch from each.
Ranks share the shards, so micro-batch j of step t holds the same samples on any number of devices, and a run resumes
by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

from lbzoo.data.base import SampleKey
from lbzoo.data.rng import stable_rng
from lbzoo.errors import DataError, UsageError
from lbzoo.scaling import accumulation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class StreamSampler(Sampler[list[SampleKey]]):
    """The micro-batches of one rank for optimizer steps ``start_step <= step < steps``, in order (steps from 0).

    The samples stand in one order, drawn once from the seed. Shard s is a range of L = N // S of them, visited in an
    order that is drawn anew from (seed, epoch, s). Each shard is one endless stream over its epochs, of which each step
    takes the next ``micro_batch_size``. From one epoch to the next the shards move on by R = N - S L, the number of
    samples that an epoch leaves out, so that none is left out for good.

    ``preshuffled`` takes the samples in the order in which they are stored. Where that is sorted, as images by class,
    it would make batches of few classes, which batch normalisation does not survive.

    Rank r has shards r S / W to (r + 1) S / W. Memory: 8 bytes for each sample of the rank's shards, and, unless
    ``preshuffled``, 8 bytes for each sample of the data set.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        preshuffled: bool = False,
    ) -> None:
        per_rank = accumulation(
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
        )
        self.num_shards = per_rank * world_size
        if self.num_shards > num_samples:
            raise UsageError(_too_many_shards(num_samples, global_batch_size, micro_batch_size))
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.shard_length = num_samples // self.num_shards
        self.remainder = num_samples % self.num_shards
        self.seed = seed
        self.step_range = range(start_step, steps)
        self.shards = range(rank * per_rank, (rank + 1) * per_rank)
        self._stored_order = None if preshuffled else stable_rng(seed).permutation(num_samples)
        self._shard_orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return len(self.step_range) * len(self.shards)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in self.step_range:
            for shard in self.shards:
                yield self.micro_batch(step, shard)

    def micro_batch(self, step: int, shard: int) -> list[SampleKey]:
        """The samples that a shard gives to a step. At random a call costs O(L), in order O(micro_batch_size)."""
        keys: list[SampleKey] = []
        first, stop = step * self.micro_batch_size, (step + 1) * self.micro_batch_size
        while first < stop:  # more than once where the shard's epoch ends inside the micro-batch
            epoch, offset = divmod(first, self.shard_length)
            count = min(self.shard_length - offset, stop - first)
            indices = self._shard_order(shard, epoch)[offset : offset + count]
            keys += [SampleKey(index, epoch) for index in indices.tolist()]
            first += count
        return keys

    def _shard_order(self, shard: int, epoch: int) -> NDArray[np.int64]:
        """The indices of a shard's samples in the order of an epoch; the latest epoch of each shard is kept."""
        kept_epoch, order = self._shard_orders.get(shard, (None, None))
        if order is None or kept_epoch != epoch:
            within = stable_rng(self.seed, epoch, shard).permutation(self.shard_length)
            places = (epoch * self.remainder + shard * self.shard_length + within) % self.num_samples
            order = places if self._stored_order is None else self._stored_order[places]
            self._shard_orders[shard] = epoch, order
        return order


class EvalSampler(Sampler[list[int]]):
    """Every validation sample exactly once over the ranks, in batches of about ``micro_batch_size``.

    All ranks yield the same number of batches, none of them empty: a wrapped model may communicate in its forward pass,
    and a rank with one batch more would wait for the others for ever. So batch sizes differ, by at most one on a rank.
    """

    def __init__(self, *, num_samples: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if num_samples < world_size:
            raise DataError(
                f"a validation set of {num_samples} samples cannot be shared by {world_size} devices; "
                f"use at most {num_samples}"
            )
        self._samples = _part(range(num_samples), rank, world_size)
        largest_part = -(-num_samples // world_size)
        # A part may be shorter than the largest by one, which leaves no sample for the last of its micro-batches of 1.
        self._num_batches = min(-(-largest_part // micro_batch_size), num_samples // world_size)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self._num_batches):
            yield list(_part(self._samples, batch, self._num_batches))


def _part(items: range, part: int, parts: int) -> range:
    """The part-th of ``parts`` contiguous parts whose lengths differ by at most one."""
    return items[part * len(items) // parts : (part + 1) * len(items) // parts]


def _too_many_shards(num_samples: int, global_batch_size: int, micro_batch_size: int) -> str:
    shards = global_batch_size // micro_batch_size
    fitting = next(shards // k for k in range(2, shards + 1) if shards % k == 0 and shards // k <= num_samples)
    return (
        f"global_batch_size {global_batch_size} / micro_batch_size {micro_batch_size} makes {shards} shards, but there "
        f"are only {num_samples} training samples; use micro_batch_size {global_batch_size // fitting} or more, or "
        f"global_batch_size {num_samples * micro_batch_size} or less"
    )
