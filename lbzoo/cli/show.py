"""``lbzoo show``: a recipe as it will run, every value with its origin."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lbzoo.cli.fit import ScaleName
from lbzoo.cli.row_option import RowOption


def show(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one in the zoo.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    scale: Annotated[ScaleName, typer.Option(help="mini: embedded data and a small model.")] = ScaleName.paper,
    groups: Annotated[bool, typer.Option("--groups", help="Also the parameter groups of the real model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May the recipe import code?")] = True,
    row: RowOption = None,
) -> None:
    """Show a recipe resolved: base, scale and overrides applied, defaults filled in, each value with its origin."""
    from lbzoo.cli.printing import print_json, print_notes
    from lbzoo.cli.row_option import load
    from lbzoo.recipe.annotate import annotate
    from lbzoo.recipe.dry_run import dry_run

    resolved = load(recipe, row, overrides, scale.value, allow_plugins=plugins)
    built = {stage.name: dry_run(stage) for stage in resolved.stages} if groups else {}
    if json:
        print_json(_as_data(resolved, built))
        return
    lines = annotate(resolved)
    width = min(max(len(line.text) for line in lines), 60)
    typer.echo(f"# {resolved.name} at scale {resolved.scale} (hash {resolved.hash})")
    for line in lines:
        remark = typer.style(f"  # {line.remark}", dim=True) if line.remark else ""
        typer.echo(f"{line.text:<{width}}{remark}" if remark else line.text)
    for name, model in built.items():
        _print_groups(name, model)
    print_notes([*resolved.notes, *dict.fromkeys(text for model in built.values() for text in model.warnings)])


def _print_groups(stage: str, model: Any) -> None:
    from lbzoo.cli.printing import aligned
    from lbzoo.recipe.dry_run import summarise

    typer.echo(f"\n# stage {stage}: {model.parameters:,} parameters in {model.tensors} tensors")
    for number, group in enumerate(model.groups):
        elements = sum(_elements(shape) for _, shape in group.parameters)
        typer.echo(f"# group {number}: {len(group.parameters)} tensors, {elements:,} parameters")
        options = [f"{key} {value}" for key, value in group.options.items() if value is not None]
        typer.echo(f"#   {', '.join(options)}")
        rows = [[pattern, shapes, f"x {count}" if count > 1 else ""] for pattern, shapes, count in summarise(group)]
        for line in aligned(rows):
            typer.echo(f"#     {line}")


def _elements(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)


def _as_data(resolved: Any, built: dict[str, Any]) -> dict[str, Any]:
    import dataclasses

    from lbzoo.recipe.annotate import describe_origin
    from lbzoo.recipe.nodes import dotted

    stages = []
    for stage in resolved.stages:
        data = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
        for key in ("task", "data", "optimizer"):
            data[key] = {"name": data[key].name, **data[key].options}
        data["schedule"] = stage.schedule.model_dump(exclude_none=True)
        data["lr_scaling"] = stage.lr_scaling.model_dump() if stage.lr_scaling else None
        data["origins"] = {dotted(path): describe_origin(origin, resolved) for path, origin in stage.origins.items()}
        if stage.name in built:
            data["model"] = dataclasses.asdict(built[stage.name])
        stages.append(data)
    return {
        "name": resolved.name,
        "path": str(resolved.path),
        "scale": resolved.scale,
        "hash": resolved.hash,
        "seed": resolved.seed,
        "stages": stages,
        "callbacks": [{"name": callback.name, **callback.options} for callback in resolved.callbacks],
        **{key: getattr(resolved, key).model_dump(exclude_none=True) for key in ("trainer", "checkpoint", "logging")},
        "expect": dict(resolved.expect),
        "notes": list(resolved.notes),
        "document": resolved.document,
    }
