"""GradientStats on one device: against the gradients one by one, through what loops do to gradients, and its errors."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brute_force import data, gradients, loss_of, make_model, mean_and_variance
from torch import Tensor, nn

import lbzoo
from lbzoo.errors import UsageError
from lbzoo.gsnr import GradientStats, attached_stats


def backward(model: nn.Module, parts: int, *, used: int | None = None, scale: float = 1.0, divide: bool = True) -> None:
    x, y = data()
    for x_part, y_part in list(zip(x.chunk(parts), y.chunk(parts), strict=True))[:used]:
        loss = loss_of(model, x_part, y_part) * scale
        (loss / (used or parts) if divide else loss).backward()


def assert_variance(
    stats: GradientStats, expected: dict[str, tuple[Tensor, Tensor]], factor: float = 1.0, tolerance: float = 1e-6
) -> None:
    mean, variance = stats.mean(), stats.variance()
    assert mean.keys() == expected.keys()
    largest = factor**2 * max(each.max().item() for _, each in expected.values())
    for name, (expected_mean, expected_variance) in expected.items():
        torch.testing.assert_close(mean[name].double(), factor * expected_mean, rtol=1e-5, atol=1e-6 * factor)
        torch.testing.assert_close(
            variance[name].double(), factor**2 * expected_variance, rtol=0, atol=tolerance * largest
        )


@pytest.mark.parametrize(
    ("name", "parts"), [("net", 2), ("net", 4), ("net", 16), ("tied", 4), ("conv", 4), ("routed", 4), ("routed", 16)]
)
def test_mean_and_variance(name: str, parts: int) -> None:
    expected = mean_and_variance(make_model(name), *data(), parts)
    model = make_model(name)
    stats = GradientStats(model)
    for _ in range(2):
        model.zero_grad()
        backward(model, parts)
    assert stats.num_gradients == parts
    assert_variance(stats, expected)


def test_per_sample_variance_against_torch_func() -> None:
    model = make_model()
    x, y = data()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(lambda x: torch.func.functional_call(model, parameters, (x,)), x[None], y[None])

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    stats = GradientStats(model)
    backward(model, len(x))
    assert_variance(stats, {name: (g.double().mean(0), g.double().var(0, unbiased=False)) for name, g in rows.items()})


def test_gsnr_and_its_mean() -> None:
    expected = mean_and_variance(make_model(), *data(), 8)
    model = make_model()
    stats = GradientStats(model)
    backward(model, 8)
    gsnr, per_layer = stats.gsnr(), stats.mean_gsnr_per_layer()
    for name, (mean, variance) in expected.items():
        torch.testing.assert_close(gsnr[name].double(), mean.square() / variance, rtol=1e-3, atol=1e-5)
        assert per_layer[name].item() == pytest.approx((mean.square() / variance).mean().item(), rel=1e-3)


def test_generalization_ratio_from_its_definition() -> None:
    """1 - sum_j W_j / (k r_j + 1), W_j the share of the squared mean, r_j and W_j with unbiased estimates in them."""
    k = 8
    rows = torch.cat([g.flatten(1) for g in gradients(make_model(), *data(), k).values()], dim=1)
    mean, unbiased = rows.mean(0), rows.var(0)
    signal = mean.square() - unbiased / k
    shares = mean.square() / mean.square().sum()
    expected = 1 - (shares / (k * signal / unbiased + 1)).sum()
    model = make_model()
    stats = GradientStats(model)
    backward(model, k)
    assert stats.generalization_ratio() == pytest.approx(expected.item(), rel=1e-5)


def test_elements_without_gradients_have_no_ratio() -> None:
    model = nn.Embedding(6, 3)
    stats = GradientStats(model)
    for rows in ([0, 1], [0, 2], [1, 2], [0, 0]):
        (model(torch.tensor(rows)) * torch.randn(2, 3)).sum().backward()
    gsnr = stats.gsnr()["weight"]
    assert torch.isnan(gsnr[3:]).all()
    assert torch.isfinite(gsnr[:3]).all()
    torch.testing.assert_close(stats.mean_gsnr_per_layer()["weight"], gsnr[:3].mean())


def test_identical_gradients_have_the_largest_ratio_that_the_type_resolves() -> None:
    model = nn.Linear(5, 3)
    stats = GradientStats(model)
    x = torch.randn(2, 5)
    for _ in range(7):
        model(x).square().sum().backward()
    assert stats.gsnr()["weight"].eq(2.0**20).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    stats = GradientStats(model)
    x, y = (tensor.to(dtype) for tensor in data())
    for x_part, y_part in zip(x.chunk(4), y.chunk(4), strict=True):
        (loss_of(model, x_part, y_part) / 4).backward()
    expected = mean_and_variance(make_model().double(), *(tensor.double() for tensor in data()), 4)
    largest = max(variance.max().item() for _, variance in expected.values())
    state_dtype = torch.promote_types(dtype, torch.float32)
    for name, (_, variance) in expected.items():
        actual = stats.variance()[name]
        assert actual.dtype == state_dtype
        tolerance = {torch.float64: 1e-14, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
        torch.testing.assert_close(actual.double(), variance, rtol=0, atol=tolerance * largest)


def test_autocast() -> None:
    model = make_model()
    stats = GradientStats(model)
    with torch.autocast("cpu", torch.bfloat16):
        backward(model, 4)
    assert {value.dtype for value in stats.variance().values()} == {torch.float32}


def test_a_loop_that_adds_up_without_dividing() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 4, divide=False)
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4), factor=4)


def test_loss_scale_and_clipping_are_divided_out() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 4, scale=2.0**16)
    for p in model.parameters():
        p.grad.div_(2.0**16)
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4), factor=0.01 / (norm.item() + 1e-6))


def test_clipping_a_part_of_the_model() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 4)
    whole = stats.variance()
    model.a.weight.grad.mul_(0.1)
    after = stats.variance()
    torch.testing.assert_close(after["a.weight"], 0.01 * whole["a.weight"])
    assert torch.equal(after["b.weight"], whole["b.weight"])


def test_a_window_that_nobody_used_is_dropped() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 16)
    model.zero_grad()
    backward(model, 4)
    assert stats.num_gradients == 4
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4))


def test_a_window_after_reset_with_gradients_set_to_zero() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 16)
    stats.reset()
    model.zero_grad(set_to_none=False)
    backward(model, 4)
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4))


def test_partial_window() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 8, used=3)
    x, y = (tensor[:6] for tensor in data())
    assert stats.num_gradients == 3
    assert_variance(stats, mean_and_variance(make_model(), x, y, 3))


@pytest.mark.parametrize("micro_batches", [4, 8, 16])
def test_groups(micro_batches: int) -> None:
    model = make_model()
    stats = GradientStats(model, groups=4, micro_batches=micro_batches)
    for _ in range(2):
        model.zero_grad()
        backward(model, micro_batches)
    assert stats.num_gradients == 4
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4))


def test_a_partial_window_of_groups_weighs_the_last_one_by_its_samples() -> None:
    model = make_model()
    stats = GradientStats(model, groups=4, micro_batches=8, micro_batch_size=2)
    backward(model, 8, used=5)
    assert stats.num_gradients == 3
    rows = gradients(make_model(), *(tensor[:10] for tensor in data()), 5)
    weights = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    expected = {}
    for name, g in rows.items():
        pooled = torch.stack([g[0:2].mean(0), g[2:4].mean(0), g[4]])
        shaped = weights.view(-1, *[1] * (g.ndim - 1))
        mean = (shaped * pooled).sum(0)
        expected[name] = (mean, (shaped * (pooled - mean).square()).sum(0))
    assert_variance(stats, expected, tolerance=3e-6)


def test_a_shared_object_and_another_after_it() -> None:
    model = make_model()
    stats = GradientStats(model)
    assert attached_stats(model) is stats
    stats.detach()
    assert attached_stats(model) is None
    backward(model, 4)
    assert stats.num_gradients == 0
    assert lbzoo.GradientStats(model) is attached_stats(model)


def test_nothing_outlives_the_model() -> None:
    model = make_model()
    reference = weakref.ref(model)
    backward(model, 4) if GradientStats(model) else None
    del model
    gc.collect()
    assert reference() is None


def test_the_model_can_still_be_copied() -> None:
    model = make_model()
    GradientStats(model)
    twin = copy.deepcopy(model)
    backward(twin, 2)
    assert attached_stats(model).num_gradients == 0


def test_compiled_models_are_seen_through() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    stats = GradientStats(compiled)
    backward(compiled, 4)
    assert_variance(stats, mean_and_variance(make_model(), *data(), 4))


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        action()
    return str(caught.value)


def test_too_few_gradients() -> None:
    model = make_model()
    stats = GradientStats(model)
    assert "has seen no gradients" in refused(stats.gsnr)
    backward(model, 1)
    message = refused(stats.variance)
    assert "seen 1 gradient in this step, and a variance needs two" in message
    assert "accumulate micro-batches" in message


def test_two_on_one_model() -> None:
    model = make_model()
    first = GradientStats(model)
    assert "has one already" in refused(lambda: GradientStats(model))
    first.detach()
    GradientStats(model)


def test_groups_that_do_not_fit() -> None:
    assert "3 micro-batches on each of 1 ranks do not make groups=2" in refused(
        lambda: GradientStats(make_model(), groups=2, micro_batches=3)
    )
    assert "groups must be at least 1" in refused(lambda: GradientStats(make_model(), groups=0))
    model = make_model()
    stats = GradientStats(model, groups=4)
    backward(model, 8)
    assert "say how many a rank makes in a step, as in micro_batches=8" in refused(stats.gsnr)


def test_noise_scale_needs_the_micro_batch_size() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 4)
    assert "give it micro_batch_size" in refused(stats.noise_scale)


class WithTable(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(3, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.table(rows))


def test_parameters_that_cannot_be_seen_are_named_and_left_out() -> None:
    model = WithTable(nn.Embedding(6, 3, sparse=True))
    with pytest.warns(UserWarning, match=r"leaves out table\.weight \(its gradient is sparse"):
        stats = GradientStats(model)
    for _ in range(2):
        model(torch.tensor([0, 1])).sum().backward()
    assert set(stats.gsnr()) == {"head.weight", "head.bias"}
    table = nn.Embedding(6, 3, sparse=True)
    assert "can see no gradient of this model: weight" in refused(lambda: GradientStats(table))


def test_complex_parameters_are_named_and_left_out() -> None:
    model = WithTable(nn.Embedding(6, 3))
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.warns(UserWarning, match=r"leaves out phase \(it is complex"):
        GradientStats(model)


def test_an_optimizer_inside_the_backward_pass_is_named() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = WithTable(nn.Embedding(6, 3))
    _apply_optimizer_in_backward(torch.optim.SGD, model.table.parameters(), {"lr": 0.1})
    with pytest.warns(UserWarning, match=r"table\.weight \(its optimizer runs inside the backward pass\)"):
        GradientStats(model)


def test_fused_embedding_tables_are_named() -> None:
    tables = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    table = tables.SplitTableBatchedEmbeddingBagsCodegen(
        [(6, 4, common.EmbeddingLocation.HOST, tables.ComputeDevice.CPU)], optimizer=tables.OptimType.EXACT_SGD
    )
    model = WithTable(table)
    assert any(p.requires_grad for p in table.parameters())
    with pytest.warns(UserWarning, match=r"table\.\S+ \(SplitTableBatchedEmbeddingBagsCodegen updates it inside"):
        GradientStats(model)


def test_a_model_without_trained_parameters() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert "no parameter that requires a gradient" in refused(lambda: GradientStats(frozen))


def test_sparse_gradients_that_were_not_announced() -> None:
    model = WithTable(nn.Embedding(6, 3))
    GradientStats(model)
    model.table.sparse = True
    assert "table.weight has a sparse gradient" in refused(lambda: model(torch.tensor([0])).sum().backward())


def test_nan_stays_nan() -> None:
    model = make_model()
    stats = GradientStats(model)
    backward(model, 4)
    model.a.weight.grad[0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isnan(stats.gsnr()["a.weight"]).all()  # the factor since the last backward pass is unknown
    assert torch.isfinite(stats.gsnr()["b.weight"]).all()
