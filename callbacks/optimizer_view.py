"""What callbacks ask of an optimizer, whoever wrote and wrapped it: the optimizer itself, its lr, its layers' names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lbzoo.errors import UsageError, did_you_mean


def unwrap(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """The optimizer inside Lightning's and accelerate's wrappers.

    An optimizer that reports ``layer_stats`` is the one that is meant, also when it holds another in itself.
    """
    # Lightning's wrapper pretends to be of the class that it wraps, but an attribute set on it stays on it.
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    inner = getattr(optimizer, "optimizer", None)
    if not hasattr(optimizer, "layer_stats") and isinstance(inner, Optimizer):
        return unwrap(inner)
    return optimizer


def learning_rate(optimizer: Optimizer) -> float | Tensor:
    """The schedule's learning rate: that of the first group before its ``lr_scale`` (a frozen group, 0, has none).

    A tensor where the optimizer keeps one, so that asking does not synchronise the device.
    """
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        if scale != 0.0:
            lr: float | Tensor = group["lr"] / scale
            return lr
    return 0.0


@dataclass(frozen=True)
class Layer:
    """A parameter tensor that an optimizer trains."""

    name: str  # it is logged under
    reported_as: str  # the optimizer's name for it, in its layer_stats()
    parameter: Tensor
    optimizer: Optimizer
    group: Mapping[str, Any]


def trained_layers(optimizers: Sequence[Optimizer], module: nn.Module) -> list[Layer]:
    """The optimizers' parameters, in the module's order; those that are not the module's come last.

    Named as in the module, else as in their groups, else by their position.
    """
    of_module = {id(parameter): name for name, parameter in module.named_parameters()}
    order = {key: index for index, key in enumerate(of_module)}
    found: list[Layer] = []
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            of_group = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                reported_as = of_group[position] if of_group else f"group{index}.{position}"
                name = of_module.get(id(parameter), reported_as)
                found.append(Layer(name, reported_as, parameter, optimizer, group))
    found.sort(key=lambda layer: order.get(id(layer.parameter), len(order)))
    names = short_names([layer.name for layer in found])
    return [replace(layer, name=name) for layer, name in zip(found, names, strict=True)]


def short_names(names: Sequence[str]) -> list[str]:
    """Parameter names as they are logged: without the wrappers' parts, and without the task's leading ``model.``."""
    short = [name.replace("_orig_mod.", "") for name in names]
    if all(name.startswith("module.") for name in short):
        short = [name.removeprefix("module.") for name in short]
    shorter = [name.removeprefix("model.") for name in short]
    return shorter if len(set(shorter)) == len(shorter) else short


def select(names: Sequence[str], patterns: Sequence[str], *, what: str) -> list[int]:
    """The positions of the names that any of the globs matches. A glob that matches nothing is a UsageError."""
    for pattern in patterns:
        if not matching(names, [pattern]):
            raise UsageError(f"no {what} matches '{pattern}'{did_you_mean(pattern, names)}")
    return matching(names, patterns)


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[int]:
    """The positions of the names that any of the globs matches; there may be none."""
    return [index for index, name in enumerate(names) if any(fnmatch.fnmatchcase(name, each) for each in patterns)]


def check_layers(module: nn.Module, patterns: Sequence[str]) -> None:
    """Raise UsageError for a glob that matches no layer that is trained."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    select(short_names(trained), patterns, what="layer")


def parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """All that the optimizer trains."""
    for group in optimizer.param_groups:
        yield from group["params"]
