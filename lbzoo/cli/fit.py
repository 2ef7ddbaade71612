"""``lbzoo fit``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lbzoo.cli.printing import say
from lbzoo.cli.row_option import RowOption


class ScaleName(StrEnum):
    paper = "paper"
    mini = "mini"
    smoke = "smoke"


def fit(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one in the zoo.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    scale: Annotated[ScaleName, typer.Option(help="mini: embedded data and a small model.")] = ScaleName.paper,
    resume: Annotated[str | None, typer.Option(help="auto, a run folder or a checkpoint.")] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Weights to start from: a run, checkpoint, file, or folder of transformers.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May the recipe import code?")] = True,
    row: RowOption = None,
) -> int:
    """Train a recipe, or a row of a paper's table.

    Examples: lbzoo fit resnet50_novograd_32k optimizer.lr=0.02 --scale mini    lbzoo fit lamb/5 --row batch_size=8192
    """
    from lbzoo.cli.row_option import recipe_of_row
    from lbzoo.engines import fit as run_fit

    found = recipe_of_row(recipe, row)
    # A file of its own, which the processes of a launcher find as well.
    result = run_fit(
        recipe if found is None else found.write(runs / "tables" / found.row.table / "rows"),
        overrides or (),
        scale=scale.value,
        resume=resume,
        init_from=init_from,
        runs=runs,
        allow_plugins=plugins,
        say=say,
    )
    _print_result(result.run_dir, result.state, result.step, dict(result.metrics), result.exit_code)
    return result.exit_code


def _print_result(run_dir: Path, state: str, step: int, metrics: dict[str, float], exit_code: int) -> None:
    import os

    from lbzoo.checkpoint.folder import CheckpointFolder

    if os.environ.get("RANK", "0") != "0" or ("RANK" in os.environ and "LBZOO_RUN_FOLDER" in os.environ):
        return  # the process that started this one prints
    values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    say(f"{state} at step {step}: {values}" if values else f"{state} at step {step}")
    say(f"watch it:  tensorboard --logdir {run_dir / 'tensorboard'}")
    if exit_code and CheckpointFolder(run_dir / "checkpoints").steps():
        say(f"continue:  add --resume {run_dir}")
