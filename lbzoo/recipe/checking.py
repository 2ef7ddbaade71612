"""Everything that can be found wrong with a recipe without its data: what ``lbzoo check`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbzoo.errors import UsageError
from lbzoo.papers import find_rows
from lbzoo.recipe.finding import find_recipe
from lbzoo.recipe.nodes import Problem, RecipeError
from lbzoo.recipe.reading import read_recipe
from lbzoo.recipe.resolved import ResolvedRecipe
from lbzoo.recipe.resolving import load_recipe
from lbzoo.recipe.schema import Scale


def check_recipe(
    ref: str | Path,
    overrides: Sequence[str] = (),
    *,
    row: Mapping[str, Any] | None = None,
    allow_plugins: bool = True,
) -> tuple[list[Scale], list[Problem]]:
    """The scales that a recipe has, and its mistakes at all of them, the row of its table too.

    ``row``: a table's row over the recipe.

    Raises UsageError where there is no such recipe.
    """
    path = find_recipe(ref)
    scales = _scales(path)
    problems: list[Problem] = []
    for scale in scales:
        try:
            recipe = load_recipe(path, overrides, scale, row=row, allow_plugins=allow_plugins)
        except RecipeError as error:
            problems += error.problems
        else:
            problems += _check_table(recipe)
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
