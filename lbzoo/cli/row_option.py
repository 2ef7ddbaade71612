"""A row of a paper's table where a verb takes a recipe: ``lbzoo fit lamb/5 --row batch_size=1024``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lbzoo.errors import UsageError

if TYPE_CHECKING:
    from lbzoo.recipe import ResolvedRecipe
    from lbzoo.recipe.schema import Scale
    from lbzoo.tables.row_recipes import RowRecipe

RowOption = Annotated[
    str | None,
    typer.Option("--row", metavar="ROW", help="With a table (lamb/5) in place of a recipe: batch_size=1024, or 2."),
]


def is_table(ref: str) -> bool:
    """Whether ``ref`` has the form of a table's id, and no recipe has that name."""
    from lbzoo.papers import PAPERS
    from lbzoo.recipe.finding import find_recipe

    paper, slash, number = ref.partition("/")
    if paper not in PAPERS or not slash or "/" in number or number.endswith((".yaml", ".yml")):
        return False
    try:
        find_recipe(ref)
    except UsageError:
        return True
    return False


def recipe_of_row(ref: str, row: str | None) -> RowRecipe | None:
    """The row of the table ``ref``; None where ``ref`` is a recipe. Raises UsageError where the row cannot be run."""
    if not is_table(ref):
        if row is not None:
            raise UsageError(f"--row picks a row of a table, and '{ref}' is none; tables are named like lamb/5")
        return None
    from lbzoo.tables.paper_tables import one_row, paper_table
    from lbzoo.tables.row_recipes import Unavailable, recipe_of

    found = recipe_of(one_row(paper_table(ref), row))
    if isinstance(found, Unavailable):
        raise UsageError(f"{ref} row {found.row.number} ({found.row.label}): {found.reason}")
    return found


def load(
    ref: str, row: str | None, overrides: Sequence[str] | None, scale: Scale, *, allow_plugins: bool
) -> ResolvedRecipe:
    """The recipe or the row of a table, resolved."""
    from lbzoo.recipe import load_recipe

    found = recipe_of_row(ref, row)
    if found is not None:
        return found.load(scale, overrides or ())
    return load_recipe(ref, overrides or (), scale, allow_plugins=allow_plugins)
