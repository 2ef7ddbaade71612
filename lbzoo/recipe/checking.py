"""Everything that can be found wrong with a recipe without its data: what ``lbzoo check`` runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from lbzoo.errors import UsageError
from lbzoo.papers import find_rows
from lbzoo.recipe.finding import find_recipe
from lbzoo.recipe.nodes import KeyPath, Origin, Problem, RecipeError
from lbzoo.recipe.reading import read_recipe
from lbzoo.recipe.resolved import ResolvedRecipe
from lbzoo.recipe.resolving import load_recipe
from lbzoo.recipe.schema import Scale


def check_recipe(
    ref: str | Path, overrides: Sequence[str] = (), *, allow_plugins: bool = True
) -> tuple[list[Scale], list[Problem]]:
    """The scales that a recipe has, and its mistakes at all of them, its optimizers' values and its table row too.

    Raises UsageError where there is no such recipe.
    """
    path = find_recipe(ref)
    scales = _scales(path)
    problems: list[Problem] = []
    for scale in scales:
        try:
            recipe = load_recipe(path, overrides, scale, allow_plugins=allow_plugins)
        except RecipeError as error:
            problems += error.problems
        else:
            problems += _check_optimizers(recipe) + _check_table(recipe)
    return scales, RecipeError(problems).problems


def _scales(path: Path) -> list[Scale]:
    """mini and smoke only where the recipe, or its base, has a mini: block."""
    try:
        recipe, _ = read_recipe(path)
        base = recipe.get("base")
        if recipe.get("mini") is None and base is not None and isinstance(base.value, str):
            recipe, _ = read_recipe(find_recipe(base.value, path.parent))
    except UsageError:  # said by load_recipe
        return ["paper"]
    return ["paper", "mini", "smoke"] if recipe.get("mini") is not None else ["paper"]


def _check_optimizers(recipe: ResolvedRecipe) -> list[Problem]:
    """Build each stage's optimizer for one parameter without values: it refuses what is out of its range."""
    import torch

    from lbzoo.optim import create_optimizer

    problems = []
    for stage in recipe.stages:
        weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no rule matches this one parameter
                create_optimizer(
                    [("weight", weight)], stage.optimizer.name, param_rules=stage.param_rules, **stage.optimizer.options
                )
        except UsageError as error:
            problems.append(Problem(_optimizer_origin(stage.origins, str(error)), str(error)))
    return problems


def _optimizer_origin(origins: object, message: str) -> Origin:
    """The line of the option that the message names, or of the block."""
    assert isinstance(origins, dict)
    paths: list[KeyPath] = [path for path in origins if path[0] == "optimizer" and len(path) == 2]
    named = [path for path in paths if str(path[1]) in message.replace(":", " ").replace("'", " ").split()]
    origin: Origin = origins[named[0] if named and named[0][1] != "name" else ("optimizer",)]
    return origin


def _check_table(recipe: ResolvedRecipe) -> list[Problem]:
    if recipe.table is None:
        return []
    origin = recipe.origins[("table",)]
    try:
        rows = find_rows(recipe.table.id, recipe.table.row)
    except UsageError as error:
        return [Problem(origin, str(error))]
    if len(rows) != 1:
        return [Problem(origin, f"{len(rows)} rows of table {recipe.table.id} hold {recipe.table.row}; one should")]
    return []
