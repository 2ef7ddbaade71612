"""``lbzoo check``: every mistake of a recipe at once, with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lbzoo.cli.row_option import RowOption
from lbzoo.errors import UsageError

if TYPE_CHECKING:
    from lbzoo.recipe.nodes import Problem
    from lbzoo.recipe.schema import Scale


def check(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes, or tables (lamb/5); default: all recipes.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May recipes import code?")] = True,
    row: RowOption = None,
) -> int:
    """Check recipes, or all rows of a table, at every scale and without data. Exit code 2 where one has a mistake."""
    from lbzoo.cli.printing import print_json
    from lbzoo.recipe.finding import list_recipes

    report = []
    failed = False
    for ref in recipes or [str(recipe.path) for recipe in list_recipes()]:
        try:
            found = list(_checked(ref, row, allow_plugins=plugins))
        except UsageError as error:
            found = [(ref, [], [str(error)])]
        for name, scales, problems in found:
            messages = [str(problem) for problem in problems]
            failed = failed or bool(messages)
            report.append({"recipe": name, "scales": scales, "problems": messages})
            if not json:
                _print(name, list(scales), messages)
    if json:
        print_json(report)
    return 2 if failed else 0


def _checked(
    ref: str, row: str | None, *, allow_plugins: bool
) -> Iterator[tuple[str, list[Scale], Sequence[Problem | str]]]:
    """(what, its scales, its mistakes) of a recipe, or of each row of a table; a row that is not built is in order."""
    from lbzoo.cli.row_option import is_table
    from lbzoo.recipe.checking import check_recipe

    if not is_table(ref):
        if row is not None:
            raise UsageError(f"--row picks a row of a table, and '{ref}' is none; tables are named like lamb/5")
        scales, problems = check_recipe(ref, allow_plugins=allow_plugins)
        yield ref, scales, problems
        return
    from lbzoo.tables.paper_tables import paper_table, select_rows
    from lbzoo.tables.row_recipes import Unavailable, recipe_of

    for each in select_rows(paper_table(ref), [row] if row is not None else []):
        found = recipe_of(each)
        name = f"{ref} row {each.number} ({each.label})"
        if isinstance(found, Unavailable):
            yield f"{name}: {found.reason}", [], []
            continue
        scales, problems = check_recipe(found.path, row=found.layer)
        yield f"{name} on {found.name}", scales, problems


def _print(ref: str, scales: list[str], messages: list[str]) -> None:
    if not messages and not scales:
        typer.echo(ref)
        return
    if not messages:
        typer.echo(f"{ref}: in order at scale {', '.join(scales)}")
        return
    for message in messages:
        typer.echo(f"error: {message}", err=True)
    if len(messages) > 1:
        typer.echo(f"{ref}: {len(messages)} mistakes", err=True)
