"""Kernels in pieces, norms that stay accurate, and the fused kernels' guards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lbzoo.optim import create_optimizer, elementwise, fused_kernels
from lbzoo.optim.elementwise import add_scaled_, run, sweep


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(elementwise, "PIECE", 10)


def tensors_of_many_layouts() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(3),
        torch.randn(()),
        torch.randn(0),
        torch.randn(7, 5),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(6, 5).t(),
        torch.randn(8, 8)[::2],
        torch.randn(4),
        torch.randn(5),
    ]


def test_a_kernel_sees_every_element_once_with_its_own(small_pieces):
    xs = tensors_of_many_layouts()
    ys = [x.clone() for x in xs]  # of the same layout
    ys[3] = ys[3].t().contiguous().t()  # of another
    numbers = [float(index) for index in range(len(xs))]
    calls = []

    def kernel(xs, ys, numbers):
        calls.append(sum(x.numel() for x in xs))
        for x, y, number in zip(xs, ys, numbers, strict=True):
            assert torch.equal(x, y)
            x.mul_(2).add_(number)

    run(kernel, [xs, ys, numbers])
    for x, y, number in zip(xs, ys, numbers, strict=True):
        torch.testing.assert_close(x, 2 * y + number)
    assert sum(calls) == sum(x.numel() for x in xs)
    assert sum(call > 10 for call in calls) == 2  # the tensor with another layout, and the one with gaps
    calls.clear()
    ys = [x.clone() for x in xs]
    run(kernel, [xs, ys, numbers], whole=True)
    assert calls == [sum(x.numel() for x in xs)]


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("eager", [True, False])
def test_norms_of_what_the_kernel_left(order, eager, small_pieces, monkeypatch):
    if not eager:
        monkeypatch.setattr(elementwise, "on_eager_cpu", lambda tensors: False)
    xs = tensors_of_many_layouts()
    ys = [torch.empty_like(x) for x in xs]

    def double(xs, ys):
        for x, y in zip(xs, ys, strict=True):
            torch.mul(x, 2, out=y)

    norms = sweep(double, [xs, ys], norms_of=[1, 0], order=order)
    rows = norms.root(norms.parts)
    expected = torch.tensor([float(torch.linalg.vector_norm(x.double(), order)) if x.numel() else 0.0 for x in xs])
    torch.testing.assert_close(rows[1].float(), expected)
    torch.testing.assert_close(rows[0].float(), 2 * expected)


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_a_nan_is_not_lost_between_pieces(order, small_pieces):
    for position in (0, 12, 24):
        x = torch.ones(25)
        x[position] = float("nan")
        assert sweep(None, [[x, torch.ones(3)]], norms_of=[0], order=order).parts.isnan().tolist() == [[True, False]]


def test_the_norm_of_a_large_tensor_is_good_to_a_millionth():
    torch.manual_seed(0)
    x = torch.randn(6_000_000) * torch.logspace(-3, 0, 6_000_000)
    norms = sweep(None, [[x]], norms_of=[0])
    assert norms.root(norms.parts).item() == pytest.approx(x.double().norm().item(), rel=2e-6)


def test_adding_scaled_terms(small_pieces):
    xs = tensors_of_many_layouts()
    before, ys = [x.clone() for x in xs], [torch.randn_like(x) for x in xs]
    factors = torch.linspace(-1, 1, len(xs), dtype=torch.float64)
    add_scaled_(xs, (ys, factors), (before, 2 * factors))
    for x, old, y, factor in zip(xs, before, ys, factors.tolist(), strict=True):
        torch.testing.assert_close(x, old + factor * y + 2 * factor * old)


def test_fused_kernels_are_kept_from_what_they_would_get_wrong():
    x = torch.randn(4, 4)
    assert fused_kernels.can_fuse([x], [x.clone()])
    assert not fused_kernels.can_fuse([x], [x.t()])
    assert not fused_kernels.can_fuse([x], [x.double()])
    assert not fused_kernels.can_fuse([x.bfloat16()], [x.bfloat16()])
    assert not fused_kernels.can_fuse([x.to("meta")], [x.to("meta")])
    assert not fused_kernels.can_fuse([])


@pytest.mark.parametrize("name", ["_fused_adamw_", "_fused_sgd_"])
@pytest.mark.parametrize("fault", ["missing", "raises", "wrong"])
@pytest.mark.parametrize("small", [-1, 1 << 15])
def test_a_kernel_that_is_not_what_it_was_is_not_used(name, fault, small, monkeypatch):
    monkeypatch.setattr("lbzoo.optim.batch.SMALL", small)
    kernel = getattr(torch, name)

    def other(params, *args, **kwargs):
        if fault == "raises":
            raise TypeError("unexpected keyword")
        kernel(params, *args, **kwargs)
        params[0][-1] += 1e-3

    if fault == "missing":
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch, name, other)
    fused_kernels.fused_kernels_work.cache_clear()
    try:
        assert not fused_kernels.fused_kernels_work("cpu")
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        for rule in ("lamb", "novograd", "lans"):
            create_optimizer([param], rule, lr=0.1).step()
        assert param.isfinite().all()
    finally:
        monkeypatch.undo()
        fused_kernels.fused_kernels_work.cache_clear()
    assert fused_kernels.fused_kernels_work("cpu")


class Allocations(TorchDispatchMode):
    """The bytes of storage that operations have made anew, by the number of elements of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            value.untyped_storage().data_ptr() for value in flat((args, kwargs)) if isinstance(value, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in flat(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.new.append(value.untyped_storage().nbytes() // value.element_size())
        return result


def flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [item for element in value for item in flat(element)]
    return [value]


@pytest.mark.parametrize(("name", "scratch"), [("lamb", 1), ("lans", 2), ("novograd", 0), ("lars", 0), ("lars2020", 0)])
def test_a_step_on_the_cpu_needs_no_memory_but_scratch_for_the_largest_tensor(name, scratch, monkeypatch):
    monkeypatch.setattr(elementwise, "PIECE", 1000)
    monkeypatch.setattr("lbzoo.optim.batch.CPU_LIMIT", 2000)
    monkeypatch.setattr("lbzoo.optim.batch.SMALL", 50)
    params = [nn.Parameter(torch.randn(size)) for size in (4000, 30_000, 500, 20, 20_000)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = create_optimizer(params, name, lr=0.1)
    optimizer.step()
    buffers = list(optimizer._scratch._buffers.values())
    assert [buffer.numel() for buffer in buffers if buffer.numel() > 1000] == [30_000] * scratch
    with Allocations() as allocations:
        optimizer.step()
    assert max(allocations.new) <= 1000  # nothing beyond a piece
