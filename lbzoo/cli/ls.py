"""``lbzoo ls``: what there is, read without importing any of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from lbzoo.cli.printing import print_json, print_table


class Kind(StrEnum):
    recipes = "recipes"
    optimizers = "optimizers"
    tasks = "tasks"
    data = "data"
    callbacks = "callbacks"
    schedules = "schedules"
    models = "models"


def ls(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.recipes,
    pattern: Annotated[str, typer.Argument(help="A glob on the names, such as 'resnet50_*'.")] = "*",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List recipes, optimizers, tasks, data sets, callbacks, schedules or models of our own."""
    entries = _recipes(pattern) if kind is Kind.recipes else _components(kind, pattern)
    if json:
        print_json(entries)
        return
    if kind is Kind.optimizers and pattern == "*":
        entries = _wrappers_once(entries)
    if entries:
        columns = [column for column in entries[0] if column not in ("options", "source")]
        print_table(columns, [[str(entry[column] or "") for column in columns] for entry in entries])
    else:
        typer.echo(f"no {kind.value} match '{pattern}'" if pattern != "*" else f"there are no {kind.value}")


def _recipes(pattern: str) -> list[dict[str, Any]]:
    import fnmatch

    from lbzoo.recipe.finding import list_recipes, summary

    found = [recipe for recipe in list_recipes() if fnmatch.fnmatch(recipe.name, pattern)]
    return [
        {"name": recipe.name, "summary": summary(recipe.path), "from": recipe.home, "source": str(recipe.path)}
        for recipe in found
    ]


def _components(kind: Kind, pattern: str) -> list[dict[str, Any]]:
    from lbzoo import registry

    found: registry.Registry = getattr(registry, kind.value)
    entries = []
    for name in found.names(pattern):
        entry = found.entry(name)
        summary = entry.first_line.replace("``", "`") or entry.source  # of an entry point nothing else is known
        described: dict[str, Any] = {"name": name, "summary": summary}
        if kind is Kind.optimizers:
            described["paper"] = entry.meta.get("paper", "")
        entries.append({**described, "options": list(entry.options or ()), "source": entry.source})
    return entries


def _wrappers_once(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for all the names that a wrapper makes: ``larc_<name>``."""
    from lbzoo.registry import optimizer_wrappers

    wrappers = [optimizer_wrappers.entry(prefix) for prefix in optimizer_wrappers.names()]
    sources = {wrapper.source for wrapper in wrappers}
    lines = [
        {"name": f"{wrapper.name}<name>", "summary": wrapper.first_line, "paper": wrapper.meta.get("paper", "")}
        for wrapper in wrappers
    ]
    return [entry for entry in entries if entry["source"] not in sources] + lines
