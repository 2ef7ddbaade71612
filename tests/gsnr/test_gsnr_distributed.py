"""Mean and variance over ranks and micro-batches, in every layout, against the gradients one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import gsnr_jobs
import pytest
import torch
from brute_force import data, make_model, mean_and_variance

from lbzoo.testing.processes import Processes

pytestmark = pytest.mark.dist


def assert_equals_brute_force(
    result: dict[str, Any], name: str = "net", parts: int = 4, scale: float = 1.0, tolerance: float = 1e-6
) -> None:
    expected = mean_and_variance(make_model(name), *data(), parts)
    largest_mean = max(mean.abs().max().item() for mean, _ in expected.values())
    largest_variance = max(variance.max().item() for _, variance in expected.values())
    for key, (mean, variance) in expected.items():
        torch.testing.assert_close(
            result["mean"][key].double(), scale * mean, rtol=0, atol=tolerance * scale * largest_mean
        )
        torch.testing.assert_close(
            result["variance"][key].double(), scale**2 * variance, rtol=0, atol=tolerance * scale**2 * largest_variance
        )


LAYOUTS = [
    ("ddp", 4, 1, "net"),
    ("ddp", 2, 2, "net"),
    ("ddp view", 4, 1, "net"),
    ("ddp view", 2, 2, "conv"),
    ("ddp", 1, 4, "net"),
    ("ddp", 2, 2, "tied"),
    ("ddp unused", 4, 1, "routed"),
    ("ddp unused", 2, 2, "routed"),
    ("fsdp", 4, 1, "net"),
    ("fsdp", 2, 2, "net"),
    ("fsdp", 1, 4, "net"),
    ("hsdp", 4, 1, "net"),
    ("list", 2, 2, "net"),
    ("mixed", 2, 2, "net"),
    ("mixed", 4, 1, "net"),
    ("mixed", 1, 4, "net"),
    ("one group", 2, 2, "tied"),
]


@pytest.mark.parametrize(("layout", "ranks", "micro_batches", "name"), LAYOUTS)
def test_four_gradients(four_ranks: Processes, layout: str, ranks: int, micro_batches: int, name: str) -> None:
    result = four_ranks.run(ranks, gsnr_jobs.collect, layout, name, micro_batches)[0]
    assert result["k"] == 4
    assert_equals_brute_force(result, name)


@pytest.mark.parametrize("layout", ["ddp", "ddp view", "fsdp", "mixed"])
def test_after_clipping(four_ranks: Processes, layout: str) -> None:
    result = four_ranks.run(2, partial(gsnr_jobs.collect, layout, "net", 2, clip=0.01))[0]
    assert_equals_brute_force(result, scale=0.01)


@pytest.mark.parametrize("layout", ["fsdp", "mixed"])
def test_nan_stays_in_its_layer(four_ranks: Processes, layout: str) -> None:
    """Also where the factor by which gradients were clipped is taken from all sharded parameters together."""
    result = four_ranks.run(2, partial(gsnr_jobs.collect, layout, "net", 2, spoil="a.weight"))[0]
    assert result["variance"].pop("a.weight").isnan().all()
    expected = mean_and_variance(make_model(), *data(), 4)
    largest = max(variance.max().item() for _, variance in expected.values())
    for name, variance in result["variance"].items():
        torch.testing.assert_close(variance.double(), expected[name][1], rtol=0, atol=1e-6 * largest)


def expected_gsnr_per_layer(parts: int) -> dict[str, float]:
    expected = mean_and_variance(make_model(), *data(), parts)
    return {name: (mean.square() / variance).mean().item() for name, (mean, variance) in expected.items()}


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp", "mixed"])
def test_gsnr_of_layers_and_noise_scale(four_ranks: Processes, layout: str) -> None:
    """Numbers of whole tensors, the same on every rank and in every layout; one rank has empty shards."""
    results = four_ranks.run(4, partial(gsnr_jobs.collect, layout, options={"micro_batch_size": 4}, windows=2))
    for result in results:
        assert result["per_layer"] == pytest.approx(expected_gsnr_per_layer(4), rel=1e-4)
        assert result["per_layer"] == results[0]["per_layer"]
        assert result["noise_scale"] == pytest.approx(results[0]["noise_scale"], rel=1e-12)
    expected = mean_and_variance(make_model(), *data(), 4).values()
    signal, noise = sum(m.square().sum() for m, _ in expected), sum(v.sum() for _, v in expected)
    assert results[0]["noise_scale"] == pytest.approx(float(16 * noise / 3 / (signal - noise / 3)), rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "ranks", "micro_batches"),
    [("ddp", 2, 8), ("ddp", 1, 8), ("fsdp", 2, 4), ("fsdp", 1, 8), ("mixed", 2, 8)],
)
def test_groups_make_k_independent_of_the_cut(
    four_ranks: Processes, layout: str, ranks: int, micro_batches: int
) -> None:
    """Micro-batches of 1, 2 or 4 samples: with groups=4 the gradients are those of 4 samples each."""
    options = {"groups": 4, "micro_batches": micro_batches}
    result = four_ranks.run(ranks, partial(gsnr_jobs.collect, layout, "net", micro_batches, options=options))[0]
    assert result["k"] == 4
    assert_equals_brute_force(result)


@pytest.mark.parametrize(("layout", "ranks", "used"), [("ddp", 2, 3), ("fsdp", 2, 3), ("fsdp", 1, 3)])
def test_a_partial_window_counts_what_it_saw(four_ranks: Processes, layout: str, ranks: int, used: int) -> None:
    result = four_ranks.run(ranks, partial(gsnr_jobs.collect, layout, "net", 4, used))[0]
    assert result["k"] == ranks * used
    x, y = (torch.cat([part for part in whole.chunk(ranks) for part in part.chunk(4)[:used]]) for whole in data())
    expected = mean_and_variance(make_model(), x, y, ranks * used)
    for key, (_, variance) in expected.items():
        torch.testing.assert_close(result["variance"][key].double(), variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["hsdp", "hsdp late"])
@pytest.mark.parametrize(("micro_batches", "options", "k"), [(2, {}, 8), (4, {}, 16), (4, {"groups": 8}, 8)])
def test_hsdp_whenever_its_replicas_are_averaged(
    four_ranks: Processes, layout: str, micro_batches: int, options: dict[str, Any], k: int
) -> None:
    options |= {"micro_batches": micro_batches}
    result = four_ranks.run(4, partial(gsnr_jobs.collect, layout, "net", micro_batches, options=options))[0]
    assert result["k"] == k
    assert_equals_brute_force(result, parts=k)


def test_micro_batches_that_fsdp2_adds_up_before_it_reduces_are_one_gradient(four_ranks: Processes) -> None:
    """The samples of a gradient are then those of all of them."""
    options = {"micro_batch_size": 4}
    result = four_ranks.run(4, partial(gsnr_jobs.collect, "fsdp seldom", "net", 2, options=options))[0]
    assert result["k"] == 4
    assert_equals_brute_force(result)
    every = four_ranks.run(4, partial(gsnr_jobs.collect, "fsdp", "net", 1, options=options))[0]
    assert result["noise_scale"] == pytest.approx(every["noise_scale"], rel=1e-4)


def test_ddp_that_synchronises_every_micro_batch(four_ranks: Processes) -> None:
    result = four_ranks.run(2, partial(gsnr_jobs.collect, "ddp", "net", 2, no_sync=False))[0]
    assert_equals_brute_force(result)


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp", 3)])
def test_float64(four_ranks: Processes, layout: str, ranks: int) -> None:
    """FSDP2 divides in two steps in this type."""
    result = four_ranks.run(ranks, partial(gsnr_jobs.collect, layout, precision="64"))[0]
    x, y = (tensor.double() for tensor in data())
    expected = mean_and_variance(make_model().double(), x, y, ranks)
    for key, (mean, variance) in expected.items():
        torch.testing.assert_close(result["mean"][key], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result["variance"][key], variance, rtol=1e-6, atol=1e-12)


def test_bf16_gradients_are_reduced_in_float32(four_ranks: Processes) -> None:
    """The numbers are those of bfloat16 arithmetic in the model, and nothing is lost on the way."""
    result = four_ranks.run(4, partial(gsnr_jobs.collect, "fsdp", precision="bf16"))[0]
    assert result["dtypes"] == {"torch.float32"}
    assert_equals_brute_force(result, tolerance=0.05)


@pytest.mark.parametrize(("layout", "operation"), [("ddp", "allreduce_"), ("fsdp", "_reduce_scatter_base_")])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_one_collective_a_bucket_of_twice_the_bytes(
    four_ranks: Processes, layout: str, operation: str, micro_batches: int
) -> None:
    without, with_stats = (
        four_ranks.run(2, gsnr_jobs.count_collectives, layout, stats, micro_batches)[0] for stats in (False, True)
    )
    assert without.keys() == with_stats.keys() == {operation}
    assert [2 * numel for numel in without[operation]] == with_stats[operation]


def test_hsdp_takes_the_squares_along_in_its_own_all_reduce(four_ranks: Processes) -> None:
    without, with_stats = (
        four_ranks.run(4, gsnr_jobs.count_collectives, "hsdp", stats, 1)[0] for stats in (False, True)
    )
    assert {key: [2 * numel for numel in sent] for key, sent in without.items()} == with_stats


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_detach_leaves_training_as_it_was(four_ranks: Processes, layout: str) -> None:
    same_gradients, same_statistics = four_ranks.run(2, gsnr_jobs.attach_again, layout)[0]
    assert same_gradients
    assert same_statistics


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bare", "bare module in a process group of 2 ranks"),
        ("inner", "bare module in a process group of 2 ranks"),
        ("groups", "groups=3 is not a multiple of the 2 ranks"),
        ("hook taken", "communication hook already"),
        ("never synchronised", "under no_sync() the last of them must synchronise"),
        ("partial pool", "not groups=4"),
        ("fsdp1", "is a flat parameter of FSDP1"),
        ("sharded otherwise", "not by fully_shard (FSDP2)"),
        ("replicated", "use DDP instead"),
        ("fp16 reduction", "reduce_dtype=torch.float32"),
    ],
)
def test_misuse_is_named(four_ranks: Processes, case: str, words: str) -> None:
    assert words in four_ranks.run(2, gsnr_jobs.misuse, case)[0]
