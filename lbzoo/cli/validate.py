"""``lbzoo validate``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer


def validate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its best checkpoint) or a checkpoint.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    last: Annotated[bool, typer.Option("--last", help="The last checkpoint of a run folder, not the best.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May the recipe import code?")] = True,
) -> None:
    """Validation metrics of a checkpoint, with the recipe of its run."""
    from lbzoo.engines import validate as run_validate

    prefer = "last" if last else "best"
    metrics = run_validate(checkpoint, overrides or (), prefer=prefer, allow_plugins=plugins)
    if os.environ.get("RANK", "0") != "0":
        return  # all ranks have the same numbers
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    for name, value in metrics.items():
        typer.echo(f"{name:<12} {value:.5g}")
