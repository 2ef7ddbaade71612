"""``recipes/tables/*.yaml``: which recipe runs a table, and how the columns of a row become changes to it.

The format is described in docs/tables.md. A file is checked against the papers' data when it is read: tables that there
are, columns that they have, rules that pick rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lbzoo.errors import did_you_mean
from lbzoo.recipe.finding import PACKAGE_RECIPES
from lbzoo.recipe.nodes import Node, Problem, RecipeError
from lbzoo.recipe.reading import read_recipe
from lbzoo.recipe.validation import validate_block
from lbzoo.tables.paper_tables import PaperRow, figures, paper_table, table_ids

FOLDER = PACKAGE_RECIPES / "tables"

Target = str | list[str] | dict[str, str] | None


class Block(BaseModel):
    """A block with a closed set of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Needs(Block):
    """Components that a recipe is made of. While one is not registered its tables are listed as not built."""

    tasks: list[str] = []
    data: list[str] = []
    models: list[str] = []


class MiniSizes(Block):
    """A row's sizes at ``--scale mini``. One divisor for all rows keeps the ratios of the paper's batch sizes."""

    batch_divisor: PositiveInt | None = None
    """The paper's global batch size over the mini one."""
    micro_batch_size: PositiveInt | None = None
    """Samples of a micro-batch, or the whole batch where that is smaller; by default the recipe's."""
    micro_batches: PositiveInt | None = None
    """Micro-batches of a step in place of ``micro_batch_size``: the k of gradient statistics."""
    epochs_divisor: Annotated[float, Field(gt=0)] | None = None
    """The paper's epochs over the mini ones; by default every row takes the recipe's."""


class RowRule(Block):
    """What holds for some rows. All rules that match a row apply, later ones over earlier ones."""

    match: dict[str, Any]
    """Columns and the values that they must have; a list of values matches any of them."""
    recipe: str | None = None
    """The recipe of these rows."""
    set: dict[str, Any] = {}
    """Changes to the recipe, in its own keys; the row's columns come over them."""
    columns: dict[str, Target] = {}
    """Where columns of these rows go, over the file's own ``columns``."""
    needs: Needs = Needs()
    absent: str | None = None
    """What the zoo has not, and does not mean to have, so that these rows cannot be run."""
    note: str | None = None
    """What a reader of the row should know: a value that the paper does not state, another reading."""


class TableFile(Block):
    """One file: one or more tables that the same recipes run."""

    version: Literal[1]
    """The version of this format."""
    tables: list[str] = []
    """Tables by id: ``lamb/3``."""
    figures: list[str] = []
    """Figures that the recipe draws on: ``vrgd/linreg``."""
    recipe: str | None = None
    """The recipe of every row that no rule gives another: a name among the package's recipes."""
    needs: Needs = Needs()
    columns: dict[str, Target] = {}
    """Where a column's value goes, in place of or beside the usual places; null leaves the column to the recipe.

    A key of the recipe (``optimizer.lr``), several of them, or one for each part of a cell that has parts
    (``{phase1: stages.seq128.data.global_batch_size, ...}``).
    """
    metrics: dict[str, str] = {}
    """The name that a metric is logged under, where it is not the usual one: ``{test_acc: val/top1}``."""
    set: dict[str, Any] = {}
    """Changes to the recipe for every row."""
    mini: MiniSizes = MiniSizes()
    rows: list[RowRule] = []
    note: str | None = None
    """What a reader of the table should know."""


def rules_of(file: TableFile, row: PaperRow) -> list[RowRule]:
    """The rules that a row matches, in the file's order."""
    return [rule for rule in file.rows if all(_matches(row, *wanted) for wanted in rule.match.items())]


@functools.cache
def table_files(folder: Path = FOLDER) -> dict[str, TableFile]:
    """The file of every table and figure that has one, by its id. Raises RecipeError with all mistakes."""
    found: dict[str, TableFile] = {}
    problems: list[Problem] = []
    for path in sorted(folder.glob("*.yaml")):
        node, mistakes = read_recipe(path)
        file, invalid = validate_block(TableFile, node)
        mistakes += invalid
        if file is not None:
            mistakes += _check(file, node)
            for each in (*file.tables, *file.figures):
                if each in found:
                    mistakes.append(Problem(node.origin, f"{each} has a file already"))
                found[each] = file
        problems += mistakes
    if problems:
        raise RecipeError(problems)
    return found


def _check(file: TableFile, node: Node) -> Iterator[Problem]:
    """What does not fit the papers' data, each at its line."""
    for key, known in (("tables", table_ids()), ("figures", [figure.id for figure in figures()])):
        for index, each in enumerate(getattr(file, key)):
            if each not in known:
                yield Problem(_at(node, key, index), f"no such {key[:-1]} in the papers{did_you_mean(each, known)}")
    rows = [row for table in file.tables if table in table_ids() for row in paper_table(table).rows]
    columns = sorted({"table"} | {column for row in rows for column in row.settings})
    for where, named in ((), file.columns), *((("rows", i), rule.columns) for i, rule in enumerate(file.rows)):
        for column in named:
            if column not in columns:
                yield Problem(_at(node, *where, "columns", column), f"no such column{did_you_mean(column, columns)}")
    if (sizes := file.mini).micro_batch_size is not None and sizes.micro_batches is not None:
        yield Problem(_at(node, "mini"), "give micro_batch_size or micro_batches, not both")
    for index, rule in enumerate(file.rows):
        unknown = [column for column in rule.match if column not in columns]
        for column in unknown:
            at = _at(node, "rows", index, "match", column)
            yield Problem(at, f"no such column{did_you_mean(column, columns)}")
        if not unknown and not any(rule in rules_of(file, row) for row in rows):
            yield Problem(_at(node, "rows", index), "no row holds these values")


def _at(node: Node, *path: str | int) -> Any:
    for key in path:
        below = node.value[key] if node.is_list and isinstance(key, int) else node.get(str(key))
        node = below or node
    return node.origin


def _matches(row: PaperRow, column: str, wanted: Any) -> bool:
    value = row.table if column == "table" else row.settings.get(column)
    if isinstance(wanted, list) and not isinstance(value, list):
        return value in wanted
    return bool(value == wanted)
