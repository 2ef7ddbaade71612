"""``lbzoo export``: the model of a run for other libraries."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class FormatName(StrEnum):
    transformers = "transformers"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its best checkpoint) or a checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[FormatName, typer.Option(help="Whose format.")] = FormatName.transformers,
    last: Annotated[bool, typer.Option("--last", help="The last checkpoint of a run folder, not the best.")] = False,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May the recipe import code?")] = True,
) -> None:
    """Write the model of a checkpoint as transformers saves it, for `from_pretrained` and `--init-from`.

    Example: lbzoo export runs/bert_lamb/1 bert-lamb --to transformers
    """
    from lbzoo.cli.printing import print_notes
    from lbzoo.engines.export import export as run_export

    prefer = "last" if last else "best"
    notes = run_export(checkpoint, folder, form=to.value, prefer=prefer, allow_plugins=plugins)
    print_notes(notes)
    typer.echo(f"{folder}: AutoModel.from_pretrained({str(folder)!r}) reads it")
