"""A tuning table as a sweep: its rows are the points of a grid over one recipe."""

from __future__ import annotations

import math

from lbzoo.errors import UsageError
from lbzoo.tables.paper_tables import cell_text, paper_table
from lbzoo.tables.row_layers import place_of
from lbzoo.tables.row_recipes import RowRecipe, Unavailable, recipe_of
from lbzoo.tables.table_files import table_files


def grid_columns(table_id: str) -> dict[str, tuple[float | str, ...]]:
    """The columns that vary and their values, if the table's rows are all of their combinations. Raises UsageError."""
    rows = paper_table(table_id).rows
    columns = {column: tuple(dict.fromkeys(row.key.get(column) for row in rows)) for column in rows[0].key}
    if math.prod(map(len, columns.values())) != len(rows) or any(None in values for values in columns.values()):
        raise UsageError(f"{table_id} is no grid of settings; run it with: lbzoo table {table_id} --run")
    return columns  # type: ignore[return-value]  # None was ruled out


def grid_of(table_id: str) -> tuple[RowRecipe, list[str]]:
    """The recipe of a table that is a grid, and the words of the sweep over it. Raises UsageError."""
    columns = grid_columns(table_id)
    recipes = [recipe_of(row) for row in paper_table(table_id).rows]
    words = []
    for recipe in recipes:
        if isinstance(recipe, Unavailable):
            raise UsageError(f"{table_id}: {recipe.reason}")
    for column, values in columns.items():
        key = place_of(table_files()[table_id], column)
        if key is None:
            raise UsageError(f"{table_id}: {column} is not one key of a recipe; use: lbzoo table {table_id} --run")
        words.append(f"{key}={','.join(cell_text(value) for value in values)}")
    first = recipes[0]
    assert isinstance(first, RowRecipe)
    if any(isinstance(recipe, RowRecipe) and recipe.path != first.path for recipe in recipes):
        raise UsageError(f"{table_id} runs several recipes; run it with: lbzoo table {table_id} --run")
    return first, words
