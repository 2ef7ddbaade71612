"""A stage's model and optimizer on the meta device: shapes, groups and bytes of the real thing, without its memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbzoo.recipe.build import build_task, optimizer_factory
from lbzoo.recipe.resolved import Stage


@dataclass(frozen=True)
class ParamGroup:
    """A parameter group: its options, and its parameters' (name, shape)."""

    options: Mapping[str, Any]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class DryRun:
    """What a stage's model and optimizer come to. Bytes are of one full copy, before any sharding.

    ``optimizer_bytes`` is None where the optimizer cannot step without real gradients and does not say what it keeps.
    """

    parameters: int
    tensors: int
    weight_bytes: int
    optimizer_bytes: int | None
    groups: tuple[ParamGroup, ...]
    warnings: tuple[str, ...]


def dry_run(stage: Stage) -> DryRun:
    """Build the stage's task and optimizer on the meta device, and step once. Imports all that a run imports."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with torch.device("meta"):
            task = build_task(stage)
        optimizer = optimizer_factory(stage)(task)
    weights = list(task.parameters())
    names = {id(weight): name for name, weight in task.named_parameters()}
    groups = tuple(
        ParamGroup(
            {key: value for key, value in group.items() if key not in ("params", "param_names")},
            tuple((names[id(weight)], tuple(weight.shape)) for weight in group["params"]),
        )
        for group in optimizer.param_groups
    )
    return DryRun(
        parameters=sum(weight.numel() for weight in weights),
        tensors=len(weights),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        optimizer_bytes=_state_bytes(optimizer, stage),
        groups=groups,
        warnings=tuple(str(each.message) for each in caught if "param_rules" in str(each.message)),
    )


def summarise(group: ParamGroup) -> list[tuple[str, str, int]]:
    """(names with numbers as *, shapes, how many) of a group's parameters, in the model's order."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in group.parameters:
        shapes.setdefault(re.sub(r"\d+(?=\.|$)", "*", name), []).append(shape)
    return [(pattern, _shapes(found), len(found)) for pattern, found in shapes.items()]


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    texts = list(dict.fromkeys("x".join(map(str, shape)) or "scalar" for shape in shapes))
    return ", ".join(texts) if len(texts) <= 3 else f"{texts[0]} ... {texts[-1]}"


def _state_bytes(optimizer: Any, stage: Stage) -> int | None:
    import torch

    from lbzoo.optim import get_optimizer_info

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    try:
        optimizer.step()
    except Exception:  # a foreign optimizer may read values, and those with statistics want real gradients
        per_parameter = get_optimizer_info(stage.optimizer.name).state_per_param
        return None if per_parameter is None else int(4 * per_parameter * sum(weight.numel() for weight in weights))
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))
