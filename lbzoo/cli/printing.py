"""How verbs print: tables for people and for pipes, JSON for programs, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Rich table on a terminal; elsewhere aligned text, without lines or colour, cut nowhere."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, no_wrap=index == 0, style="bold" if index == 0 else None)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console(highlight=False).print(table)
        return
    for line in aligned([columns, *rows]):
        typer.echo(line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines whose columns begin at the same place."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def say(text: str) -> None:
    """A line about something that goes on where nobody reads it any more, or the disk that it goes to is full."""
    with suppress(OSError):
        typer.echo(text)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_notes(notes: Sequence[str]) -> None:
    """What was changed without being asked for, apart from what a verb prints on stdout."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)
