"""Registering an optimizer, and what is known of one by its name. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lbzoo import registry

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OptimizerInfo:
    """What a registered optimizer says of itself.

    ``state_per_param``: floats kept per parameter element (2 for Adam, 1 for NovoGrad), None where unknown.
    ``lr_scaling``: how its paper moves the learning rate with the batch ("sqrt", "linear"), None where it has no rule.
    ``layerwise``: each tensor's step depends on a norm over that whole tensor.
    ``needs_gradient_stats``: ``attach_stats`` must be called before the first step.
    """

    name: str
    description: str
    paper: str = ""
    equation: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    lr_scaling: str | None = None
    state_per_param: float | None = None
    layerwise: bool = False
    needs_gradient_stats: bool = False


def register_optimizer(
    name: str,
    *,
    paper: str = "",
    equation: str = "",
    aliases: tuple[str, ...] = (),
    lr_scaling: str | None = None,
    state_per_param: float | None = None,
    layerwise: bool = False,
    needs_gradient_stats: bool = False,
) -> Callable[[T], T]:
    """Register a class or a factory ``(params, *, options...) -> Optimizer`` under ``name``; fields: OptimizerInfo.

    Raises UsageError where another source file has taken the name.
    """
    given = {
        "paper": paper,
        "equation": equation,
        "aliases": tuple(aliases),
        "lr_scaling": lr_scaling,
        "state_per_param": state_per_param,
        "layerwise": layerwise,
        "needs_gradient_stats": needs_gradient_stats,
    }
    return registry.optimizers.register(name, **{key: value for key, value in given.items() if value not in ("", ())})


def register_optimizer_wrapper(
    prefix: str, *, paper: str = "", equation: str = "", layerwise: bool = False, needs_gradient_stats: bool = False
) -> Callable[[T], T]:
    """Register a class ``(base: Optimizer, *, options...)`` that makes every ``<name>`` exist as ``<prefix><name>``."""
    given = {
        "paper": paper,
        "equation": equation,
        "layerwise": layerwise,
        "needs_gradient_stats": needs_gradient_stats,
    }
    return registry.optimizer_wrappers.register(prefix, **{key: value for key, value in given.items() if value})


def list_optimizers(pattern: str = "*") -> list[str]:
    """The registered names that match a glob, such as ``"larc_*"``; nothing is imported."""
    return registry.optimizers.names(pattern)


def canonical_name(name: str) -> str:
    """``name``, or the registered name that it is an alias of."""
    if name not in registry.optimizers:
        for known in registry.optimizers.names():
            if name in registry.optimizers.entry(known).meta.get("aliases", ()):
                return known
    return name
