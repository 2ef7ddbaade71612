"""The model that every check trains, and how two trainings of it are compared.

The loss is the inner product of the weights with tensors that depend on the step only. So its gradients are known
exactly, are the same on every rank and in every precision, and still come out of a real backward pass: where two
trainings differ, the optimizer is the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lbzoo.testing.check import CheckFailure

# Over 2 and 3 ranks these give even, uneven and empty shards.
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "embedding": {"weight": (7, 4)},
    "conv": {"weight": (6, 3, 2, 2), "bias": (6,)},
    "head": {"weight": (2, 6), "bias": (1,)},
}
WEIGHT_SCALES = (1.0, 0.3, 0.05, 0.5, 2.0)  # of the five tensors, so that layer-wise rules treat each differently
GRADIENT_SCALES = (0.5, 4.0, 1.0, 0.02, 0.1)


class Layer(nn.Module):
    """Named parameters, numbered from ``first``, and the inner product of each with its gradient."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], first: int, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.first, self.scale = first, scale
        for index, (name, shape) in enumerate(shapes.items(), first):
            weights = WEIGHT_SCALES[index % len(WEIGHT_SCALES)] * _normal(shape, seed=index)
            self.register_parameter(name, nn.Parameter(weights.to(dtype)))

    def forward(self, step: int) -> Tensor:
        terms = [
            (parameter.float() * self.scale * gradient(index, tuple(parameter.shape), step).to(parameter.device)).sum()
            for index, parameter in enumerate(self.parameters(), self.first)
        ]
        return torch.stack(terms).sum()


class Example(nn.Module):
    """Five parameters of 1, 2 and 4 dimensions in three layers, ``copies`` times; ``scale`` multiplies gradients."""

    def __init__(self, *, copies: int = 1, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        first = 0
        for copy in range(copies):
            for name, shapes in SHAPES.items():
                self.layers[f"{name}{copy}"] = Layer(shapes, first, dtype, scale)
                first += len(shapes)

    def forward(self, step: int) -> Tensor:
        return torch.stack([layer(step) for layer in self.layers.values()]).sum()


def gradient(index: int, shape: tuple[int, ...], step: int) -> Tensor:
    """The gradient of parameter number ``index`` at ``step``; it shrinks slowly, as gradients do."""
    scale = GRADIENT_SCALES[index % len(GRADIENT_SCALES)] * 0.8**step
    return scale * _normal(shape, seed=1000 * (step + 1) + index)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    # Drawn on the CPU whatever the default device is: the same numbers everywhere, and none on the meta device.
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def backward(model: nn.Module, step: int) -> None:
    """Fresh gradients of ``step``."""
    model.zero_grad()
    model(step).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """An optimizer step for each of ``steps``, on the gradients that belong to it."""
    for step in steps:
        backward(model, step)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name, whole where they are sharded."""
    return {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree to the last bit; NaN equals NaN."""
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def expect_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Fail unless the two agree to the last bit."""
    for name, tensor in expected.items():
        if not same(actual[name], tensor):
            raise CheckFailure(f"{what}: {name} differs by {_distance(actual[name], tensor):.1e}")


def expect_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    what: str,
    *,
    tolerance: float = 1e-3,
) -> None:
    """Fail unless the two agree to ``tolerance`` of the way that each parameter has come from ``start``.

    Added to it is what float32 cannot resolve of the weight itself: a rule that moves weights by 1e-5 of their size
    cannot be seen more sharply.
    """
    for name, tensor in expected.items():
        moved = _distance(tensor, start[name])
        resolution = 8 * torch.finfo(torch.float32).eps * tensor.double().abs().max().item()
        apart = _distance(actual[name], tensor)
        if not apart <= tolerance * moved + resolution:
            raise CheckFailure(f"{what}: {name} is off by {apart:.1e}, after a way of {moved:.1e}")


def expect_finite(model: nn.Module, what: str) -> None:
    """Fail if a weight is infinite or NaN."""
    for name, parameter in model.named_parameters():
        if not whole(parameter).isfinite().all():
            raise CheckFailure(f"{what}: {name} is no longer finite")


def expect_moved(model: nn.Module, start: Mapping[str, Tensor], what: str) -> None:
    """Fail if a parameter is still what it was."""
    for name, now in weights(model).items():
        if torch.equal(now, start[name]):
            raise CheckFailure(f"{what}: {name} has not moved")


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors; NaN where either has one."""
    return (one.double() - other.double()).abs().max().item()
