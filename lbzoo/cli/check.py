"""``lbzoo check``: every mistake of a recipe at once, with its line."""

from __future__ import annotations

from typing import Annotated

import typer

from lbzoo.errors import UsageError


def check(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipe files or names; default: all there are.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May recipes import code?")] = True,
) -> int:
    """Check recipes at every scale, without their data. Exit code 2 where one has a mistake."""
    from lbzoo.cli.printing import print_json
    from lbzoo.recipe.checking import check_recipe
    from lbzoo.recipe.finding import list_recipes

    report = []
    failed = False
    for ref in recipes or [str(recipe.path) for recipe in list_recipes()]:
        try:
            scales, problems = check_recipe(ref, allow_plugins=plugins)
            messages = [str(problem) for problem in problems]
        except UsageError as error:
            scales, messages = [], [str(error)]
        failed = failed or bool(messages)
        report.append({"recipe": ref, "scales": scales, "problems": messages})
        if not json:
            _print(ref, list(scales), messages)
    if json:
        print_json(report)
    return 2 if failed else 0


def _print(ref: str, scales: list[str], messages: list[str]) -> None:
    if not messages:
        typer.echo(f"{ref}: in order at scale {', '.join(scales)}")
        return
    for message in messages:
        typer.echo(f"error: {message}", err=True)
    if len(messages) > 1:
        typer.echo(f"{ref}: {len(messages)} mistakes", err=True)
