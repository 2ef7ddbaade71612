"""``lbzoo sweep``: a recipe over lists and ranges of its keys."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lbzoo.cli.fit import ScaleName
from lbzoo.cli.row_option import RowOption


class ModeName(StrEnum):
    max = "max"
    min = "min"


def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a table whose rows are a grid (lamb/13).")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUES]...",
                     help="A list (1e-4,1e-3), a range (log(1e-4,1e-1), uniform(0,1), int(1,8)) or one value.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Points of each optimizer; default: the grid.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the points that are drawn from ranges.")] = 0,
    scale: Annotated[ScaleName, typer.Option(help="mini: embedded data and a small model.")] = ScaleName.paper,
    metric: Annotated[str | None, typer.Option(help="What trials are judged by; default: the task's own.")] = None,
    mode: Annotated[ModeName | None, typer.Option(help="Whether a high or a low metric is better.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the sweep's folder.")] = None,
    runs: Annotated[Path, typer.Option(help="Where sweeps and run folders are.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    row: RowOption = None,
) -> int:  # fmt: skip
    """Try a recipe over a grid or quasi-random points. The same command goes on with a sweep that was cut short.

    Examples: lbzoo sweep resnet50_lamb optimizer.lr=1e-3,1e-2 --scale mini    lbzoo sweep lamb/13 --jobs 8
    lbzoo sweep RECIPE optimizer.name=lamb,adamw 'optimizer.lr=log(1e-4,1e-1)' --trials 24
    """
    from lbzoo.cli.printing import print_json, print_table
    from lbzoo.tables.sweep import plan_sweep, run_sweep
    from lbzoo.tables.sweep_report import summary, summary_data, write_summary

    file, of_table = _recipe(recipe, row, runs)
    plan = plan_sweep(
        file,
        [*of_table, *(words or [])],
        trials=trials,
        seed=seed,
        scale=scale.value,
        metric=metric,
        mode=mode.value if mode is not None else None,
        name=name,
        runs=runs,
    )
    result = run_sweep(plan, jobs=jobs, say=lambda text: typer.echo(text, err=json))
    written = write_summary(result)
    if json:
        print_json(summary_data(result))
    else:
        typer.echo()
        print_table(*summary(result))
        typer.echo(f"\n{', '.join(str(path) for path in written)}")
    if result.interrupted:
        typer.echo("interrupted; the same command goes on where this one stopped", err=True)
        return 130
    return 1 if result.failed else 0


def _recipe(ref: str, row: str | None, runs: Path) -> tuple[Path, list[str]]:
    """The recipe's file, and what a table's rows vary."""
    from lbzoo.cli.row_option import is_table, recipe_of_row
    from lbzoo.recipe.finding import find_recipe
    from lbzoo.tables.table_grids import grid_of

    if row is None and is_table(ref):
        found, words = grid_of(ref)
    else:
        one, words = recipe_of_row(ref, row), []
        if one is None:
            return find_recipe(ref), []
        found = one
    return found.write(runs / "tables" / found.row.table / "rows"), words
