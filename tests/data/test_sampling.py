"""Samplers: without replacement, nothing left out, the same samples on any layout, resumed anywhere."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from lbzoo.data.base import SampleKey
from lbzoo.data.sampling import EvalSampler, StreamSampler
from lbzoo.errors import DataError, UsageError

N, G, M = 103, 24, 4  # 6 shards of 17, 1 sample left over in each epoch


def sampler(**changes: object) -> StreamSampler:
    settings = {"num_samples": N, "global_batch_size": G, "micro_batch_size": M, "seed": 5, "steps": 40}
    return StreamSampler(**{**settings, **changes})


def global_batches(world_size: int, **changes: object) -> list[list[SampleKey]]:
    """The samples of each step, put together from all ranks."""
    ranks = [list(sampler(rank=rank, world_size=world_size, **changes)) for rank in range(world_size)]
    accumulate = G // (M * world_size)
    steps = len(ranks[0]) // accumulate
    return [
        [key for batches in ranks for batch in batches[step * accumulate : (step + 1) * accumulate] for key in batch]
        for step in range(steps)
    ]


@pytest.mark.parametrize("preshuffled", [False, True])
def test_without_replacement_in_every_epoch(preshuffled: bool) -> None:
    by_epoch: dict[int, Counter[int]] = {}
    for key in itertools.chain.from_iterable(sampler(steps=17 * 20, preshuffled=preshuffled)):
        by_epoch.setdefault(key.epoch, Counter())[key.index] += 1
    # 17 * 20 steps of 4 samples from shards of 17: 80 whole epochs.
    assert sorted(by_epoch) == list(range(80))
    for counts in by_epoch.values():
        assert len(counts) == 102
        assert set(counts.values()) == {1}


@pytest.mark.parametrize("preshuffled", [False, True])
@pytest.mark.parametrize("num_samples", [103, 107, 119, 120])
def test_nothing_is_left_out_for_good(num_samples: int, preshuffled: bool) -> None:
    """The samples that an epoch leaves out come from every part of the data in turn."""
    shards, length = 6, num_samples // 6
    remainder = num_samples - shards * length
    epochs = num_samples if remainder else 1
    made = sampler(num_samples=num_samples, micro_batch_size=M, steps=math.ceil(epochs * length / M))
    counts = Counter(key.index for key in itertools.chain.from_iterable(made) if key.epoch < epochs)
    # After N epochs each sample has been left out R times.
    assert set(counts) == set(range(num_samples))
    assert set(counts.values()) == {epochs - remainder}


def test_a_shard_draws_from_its_own_range_only() -> None:
    made = sampler(preshuffled=True, steps=200)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(200):
        for shard in range(6):
            for key in made.micro_batch(step, shard):
                seen.setdefault((key.epoch, shard), []).append(key.index)
    for (epoch, shard), indices in seen.items():
        allowed = {(epoch * 1 + shard * 17 + place) % N for place in range(17)}
        assert set(indices) <= allowed
        if epoch < 47:  # a whole epoch of the 200 * 4 / 17
            assert sorted(indices) == sorted(allowed)


def test_epochs_and_shards_are_shuffled_differently() -> None:
    made = sampler(preshuffled=True, num_samples=60, micro_batch_size=G // 2, global_batch_size=G, steps=10)
    orders = [
        [key.index for step in range(5) for key in made.micro_batch(step, shard) if key.epoch == epoch]
        for shard in range(2)
        for epoch in range(2)
    ]
    relative = {tuple(index % 30 for index in order) for order in orders}
    assert len(relative) == 4
    assert all(sorted(order) == list(range(30)) for order in relative)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_same_global_batches_on_any_number_of_ranks(world_size: int) -> None:
    assert global_batches(world_size) == global_batches(1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_global_batches_on_1_2_and_4_ranks(world_size: int) -> None:
    """The very ids that were drawn when this was written: no version of a library may change them."""
    made = [
        StreamSampler(
            num_samples=1000, global_batch_size=16, micro_batch_size=2, seed=7, steps=300, rank=r, world_size=world_size
        )
        for r in range(world_size)
    ]
    streams = [itertools.chain.from_iterable(each) for each in made]
    per_rank = 16 // world_size
    steps = [[key for stream in streams for key in itertools.islice(stream, per_rank)] for _ in range(300)]
    assert [key.index for key in steps[0]] == [
        476,
        483,
        764,
        576,
        932,
        722,
        950,
        848,
        598,
        277,
        111,
        499,
        517,
        421,
        252,
        241,
    ]
    assert [key.index for key in steps[299]] == [
        264,
        852,
        580,
        537,
        125,
        938,
        283,
        81,
        210,
        251,
        429,
        161,
        790,
        402,
        385,
        36,
    ]
    assert {key.epoch for key in steps[299]} == {4}


@pytest.mark.parametrize("start", [1, 4, 5, 17, 39])
def test_resume_is_arithmetic(start: int) -> None:
    assert global_batches(1, start_step=start) == global_batches(1)[start:]
    assert global_batches(2, start_step=start) == global_batches(1)[start:]


def test_random_access_equals_the_stream() -> None:
    stream = list(sampler())
    fresh = sampler()
    for step in (39, 0, 17, 4, 38, 4):
        for shard in (5, 0, 3):
            assert fresh.micro_batch(step, shard) == stream[step * 6 + shard]


def test_iterating_twice_gives_the_same() -> None:
    made = sampler()
    assert list(made) == list(made)


def test_length_is_in_micro_batches_of_the_rank() -> None:
    assert len(sampler()) == len(list(sampler())) == 40 * 6
    assert len(sampler(rank=1, world_size=3, start_step=30)) == 10 * 2


def test_the_seed_matters() -> None:
    assert global_batches(1) != global_batches(1, seed=6)


def test_a_micro_batch_longer_than_a_shard_spans_epochs() -> None:
    made = sampler(num_samples=10, micro_batch_size=12, steps=2)  # 2 shards of 5
    keys = made.micro_batch(0, 0)
    assert [key.epoch for key in keys] == [0] * 5 + [1] * 5 + [2] * 2
    assert len({key.index for key in keys[:5]}) == 5


def test_sorted_data_gives_mixed_micro_batches() -> None:
    """Classes stored one after the other, as in a folder of images, must not make batches of few classes."""
    labels = np.arange(12800) // 100  # 128 classes
    made = StreamSampler(num_samples=12800, global_batch_size=1024, micro_batch_size=128, seed=0, steps=10)
    classes = [len({labels[key.index] for key in batch}) for batch in made]
    assert min(classes) > 60  # about 81 of 128 expected; contiguous shards of 1600 would hold 16


def test_variance_of_a_batch() -> None:
    """LANS 3.4: with k of n samples drawn without replacement, (n - k) / (n - 1) of the variance sigma^2 / k."""
    n, k, trials = 4096, 3072, 1500
    values = np.random.default_rng(0).normal(size=n)

    def mean_of_first_batch(seed: int) -> float:
        made = StreamSampler(num_samples=n, global_batch_size=k, micro_batch_size=k // 8, seed=seed, steps=1)
        return float(np.mean([values[key.index] for key in itertools.chain.from_iterable(made)]))

    means = np.array([mean_of_first_batch(seed) for seed in range(trials)])
    ratio = float(np.mean((means - values.mean()) ** 2) / (values.var() / k))
    assert (n - k) / (n - 1) == pytest.approx(0.250, abs=1e-3)
    # The estimate from this many trials has a standard deviation of 0.25 sqrt(2 / 1500) = 0.009.
    assert ratio == pytest.approx(0.250, abs=0.02)


def test_more_shards_than_samples() -> None:
    with pytest.raises(UsageError) as caught:
        sampler(num_samples=100, global_batch_size=512, micro_batch_size=2)
    assert "makes 256 shards, but there are only 100 training samples" in str(caught.value)
    assert "use micro_batch_size 8 or more, or global_batch_size 200 or less" in str(caught.value)
    sampler(num_samples=100, global_batch_size=512, micro_batch_size=8)
    sampler(num_samples=100, global_batch_size=200, micro_batch_size=2)


def test_ranks_must_share_the_micro_batches_evenly() -> None:
    with pytest.raises(UsageError, match="is no multiple of micro_batch_size 4 x 4 devices"):
        sampler(world_size=4)


@pytest.mark.parametrize("micro", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_samples", [4, 5, 7, 8, 9, 31, 64])
def test_evaluation_sees_every_sample_once(num_samples: int, world_size: int, micro: int) -> None:
    ranks = [
        list(EvalSampler(num_samples=num_samples, micro_batch_size=micro, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    everything = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(everything) == list(range(num_samples))
    # A rank with one batch more than another would hang in a collective of the forward pass.
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= max(micro, 2)
    assert max(sizes) <= micro or micro == 1
    whole = EvalSampler(num_samples=num_samples, micro_batch_size=micro, world_size=world_size)
    assert len(whole) == len(ranks[0])


def test_fewer_validation_samples_than_ranks() -> None:
    with pytest.raises(DataError, match="3 samples cannot be shared by 4 devices"):
        EvalSampler(num_samples=3, micro_batch_size=1, world_size=4)
