"""The layers of a task that are units: FSDP gathers them one at a time, activation checkpointing computes them anew."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lbzoo.errors import UsageError, did_you_mean
from lbzoo.tasks.base import Task

log = logging.getLogger(__name__)


def unit_layers(task: Task, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """The units by name, in the model's order: what the recipe's patterns match, or the task's where there are none.

    A pattern is a glob on a module's class or, segment by segment, on its path. Where a match lies within another, the
    outer one is the unit. Raises UsageError for a pattern of the recipe that matches nothing.
    """
    candidates = {
        name: module
        for name, module in task.named_modules()
        if name and any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }
    if patterns is not None:
        for pattern in patterns:
            if not any(_matches(name, module, pattern) for name, module in candidates.items()):
                raise _no_match(pattern, candidates)
    wanted = task.fsdp_layers if patterns is None else patterns
    matching = {n: m for n, m in candidates.items() if any(_matches(n, m, pattern) for pattern in wanted)}
    units: dict[str, nn.Module] = {}
    for name, module in matching.items():  # parents before their children
        if not any(name.startswith(f"{outer}.") for outer in units):
            units[name] = module
    if wanted and not units:
        log.warning(
            "no layer of this model is one of %s, so that it is one unit; trainer.fsdp.layers names others",
            ", ".join(wanted),
        )
    return units


def _matches(name: str, module: nn.Module, pattern: str) -> bool:
    path, parts = name.split("."), pattern.split(".")
    return fnmatchcase(type(module).__name__, pattern) or (
        len(path) == len(parts) and all(map(fnmatchcase, path, parts))
    )


def _no_match(pattern: str, candidates: dict[str, nn.Module]) -> UsageError:
    """The nearest class or path; the classes where nothing is near."""
    classes = {type(module).__name__ for module in candidates.values()}
    known = candidates.keys() if "." in pattern else classes
    return UsageError(f"trainer.fsdp.layers: no layer matches '{pattern}'{did_you_mean(pattern, known)}")
