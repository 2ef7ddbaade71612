"""From files, a scale and overrides to one merged recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbzoo.errors import UsageError
from lbzoo.recipe.components import leave_out_foreign
from lbzoo.recipe.finding import find_recipe
from lbzoo.recipe.merging import merge, refuse_unknown_stages, stage_node
from lbzoo.recipe.nodes import Node, Origin, Problem, RecipeError, from_plain
from lbzoo.recipe.overrides import apply_override
from lbzoo.recipe.reading import read_recipe
from lbzoo.recipe.schema import CONSTANT_KEYS, WARMUP_KEYS, Scale
from lbzoo.recipe.tidying import COMPONENTS, tidy

# What a recipe says about the paper's run. It holds for that run only: not for another scale, nor over a base.
_OF_THE_PAPER = ("table", "hardware", "expect")
_SMOKE_STEPS = 2
_SMOKE_MICRO_BATCH = 8
_SMOKE_MICRO_BATCHES = 4  # enough for gradient statistics, and a whole number for 1, 2 and 4 devices


def merged_layers(
    path: Path, overrides: Sequence[str] = (), scale: Scale = "paper", row: Mapping[str, Any] | None = None
) -> tuple[Node, list[Problem]]:
    """base < recipe < table row < scale block < command line, and the mistakes in the names of keys and stages.

    Raises RecipeError where the recipe cannot be read at all.
    """
    merged, problems = _below_the_scale(path, row)
    merged, found = _at_scale(merged, scale)
    problems += found
    for text in overrides:
        try:
            merged, found = apply_override(merged, text)
            problems += found
        except RecipeError as error:
            problems += error.problems
    stages = merged.get("stages")
    for name, stage in stages.value.items() if stages is not None and stages.is_mapping else ():
        stage.value.setdefault("name", Node(name, stage.origin))
    return merged, problems


def row_document(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, its base and a table's row over it as the content of one recipe file, ``mini:`` block included.

    Raises RecipeError with the mistakes in names; the rest is found when the file is loaded.
    """
    merged, problems = _below_the_scale(path, row)
    if problems:
        raise RecipeError(problems)
    stages = merged.get("stages")
    blocks = [merged, *(stages.value.values() if stages is not None and stages.is_mapping else ())]
    for block in blocks:  # plain data does not remember which component an option was written for
        for kind in COMPONENTS:
            if (component := block.get(kind)) is not None:
                leave_out_foreign(kind, component)
    document: dict[str, Any] = merged.plain()
    if isinstance(by_name := document.get("stages"), dict):
        document["stages"] = [{"name": name, **stage} for name, stage in by_name.items()]
    return document


def _below_the_scale(path: Path, row: Mapping[str, Any] | None) -> tuple[Node, list[Problem]]:
    """base < recipe < table row, with the ``mini:`` block still in it."""
    merged, problems = read_recipe(path)
    problems += tidy(merged)
    if (base := merged.value.pop("base", None)) is not None:
        merged, found = _over_base(merged, base, path)
        problems += found
    if row is None:
        return merged, problems
    for key in _OF_THE_PAPER:  # said of the recipe's own row
        merged.value.pop(key, None)
    layer = from_plain(dict(row), Origin("row", text="table row"))
    problems += tidy(layer) + refuse_unknown_stages(merged, layer)
    return merge(merged, layer), problems


def _over_base(recipe: Node, base_name: Node, path: Path) -> tuple[Node, list[Problem]]:
    """The recipe over its one base."""
    if not isinstance(base_name.value, str):
        return recipe, [Problem(base_name.origin, "expected the path or the name of one recipe")]
    try:
        base, problems = read_recipe(find_recipe(base_name.value, path.parent), "base")
    except RecipeError as error:
        return recipe, list(error.problems)
    except UsageError as error:
        return recipe, [Problem(base_name.origin, str(error))]
    problems += tidy(base)
    if (deeper := base.value.pop("base", None)) is not None:
        problems.append(Problem(deeper.origin, "this recipe is a base already; a base has none of its own"))
    for key in _OF_THE_PAPER:
        base.value.pop(key, None)
    problems += refuse_unknown_stages(base, recipe)
    return merge(base, recipe), problems


def _at_scale(merged: Node, scale: Scale) -> tuple[Node, list[Problem]]:
    mini = merged.value.pop("mini", None)
    if scale == "paper":
        return merged, []
    if mini is None or mini.value is None:
        return merged, [Problem(merged.origin, f"the recipe has no mini: block, so it cannot run at --scale {scale}")]
    if not mini.is_mapping:
        return merged, [Problem(mini.origin, "expected a mapping of changes (`key: value` lines)")]
    for key in _OF_THE_PAPER:
        merged.value.pop(key, None)
    problems = refuse_unknown_stages(merged, mini)
    merged = merge(merged, mini)
    return (merge(merged, _smoke(merged)) if scale == "smoke" else merged), problems


def _smoke(merged: Node) -> Node:
    """Two optimizer steps a stage on a small batch, with one step of warmup where there is any."""
    stages = merged.get("stages")
    if stages is not None and stages.is_mapping:
        changes: dict[str, Any] = {
            "stages": {name: _smoke_of(stage_node(merged, stage)) for name, stage in stages.value.items()}
        }
    else:
        changes = _smoke_of(merged)
    layer = from_plain(changes, Origin("scale", text="--scale smoke"))
    tidy(layer)
    return layer


def _smoke_of(stage: Node) -> dict[str, Any]:
    data, schedule = stage.get("data"), stage.get("schedule")
    written = data.get("micro_batch_size") if data is not None else None
    micro = written.value if written is not None and isinstance(written.value, int) else _SMOKE_MICRO_BATCH
    micro = max(min(micro, _SMOKE_MICRO_BATCH), 1)
    changes: dict[str, Any] = {
        "steps": _SMOKE_STEPS,
        "data": {"micro_batch_size": micro, "global_batch_size": micro * _SMOKE_MICRO_BATCHES},
    }
    lengths = {}
    if _gives(schedule, WARMUP_KEYS):
        lengths["warmup_steps"] = 1
    if _gives(schedule, CONSTANT_KEYS):
        lengths["constant_steps"] = 0
    return {**changes, "schedule": lengths} if lengths else changes


def _gives(schedule: Node | None, keys: tuple[str, ...]) -> bool:
    return schedule is not None and any((node := schedule.get(key)) is not None and node.value for key in keys)
