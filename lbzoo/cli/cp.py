"""``lbzoo cp``: a recipe to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbzoo.errors import UsageError


def cp(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe, or a file.")],
    dest: Annotated[Path | None, typer.Argument(help="A file or a folder; default: the working directory.")] = None,
) -> None:
    """Copy a recipe to edit it. Nothing is ever overwritten."""
    from lbzoo.recipe.finding import SUFFIXES, find_recipe

    source = find_recipe(recipe)
    target = dest if dest is not None else Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.suffix not in SUFFIXES:
        raise UsageError(f"a recipe's file ends in .yaml; did you mean '{target}.yaml'?")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder '{target.parent}'")
    text = source.read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"'{target}' exists already and is not overwritten; give another name") from None
    except OSError as error:
        raise UsageError(f"cannot write '{target}': {error.strerror}") from error
    typer.echo(f"{target}: a copy of {source.stem}; check your changes with `lbzoo check {target}`")
