"""``lbzoo table``: the papers' tables, their rows as recipes, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lbzoo.cli.fit import ScaleName

if TYPE_CHECKING:
    from lbzoo.tables.exact import ExactCheck
    from lbzoo.tables.standing import TableStanding


def table(
    which: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]... [KEY=VALUE]...",
                     help="Tables or figures (lamb/3, lans/fig1), globs of them; default: all.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Run the rows that have no result yet.")] = False,
    rows: Annotated[list[str] | None, typer.Option(help="Rows: 3, 1-4,7 or optimizer=lamb,batch_size=512.")] = None,
    scale: Annotated[ScaleName, typer.Option(help="What --run runs at.")] = ScaleName.paper,
    repeats: Annotated[int, typer.Option(min=1, help="Seeds of each row; the mean is shown.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Also run rows that have a result.")] = False,
    runs: Annotated[Path, typer.Option(help="Where results and run folders are.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a line for each row and metric.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> int:  # fmt: skip
    """List the papers' tables, show some with what was measured, or run their rows.

    Examples: lbzoo table lamb/5    lbzoo table lamb/5 --run --scale mini    lbzoo table lamb/5 --run data.root=DIR
    """
    from lbzoo.errors import UsageError

    given = which or []
    overrides = [word for word in given if "=" in word]
    refs = [word for word in given if "=" not in word]
    if sum((json, csv, markdown)) > 1:
        raise UsageError("print one of --json, --csv and --markdown")
    if not run and (overrides or again):
        raise UsageError(f"{' '.join(overrides) or '--again'} is for running rows: add --run")
    tables, figures = _chosen(refs)
    if rows and len(tables) != 1:
        raise UsageError("--rows picks rows of one table: name it")
    failed = False
    if run:
        failed = _run(tables, rows or [], scale, overrides, repeats, again, runs, quiet=json or csv or markdown)
    selected = rows or []
    if json:
        _print_json(tables, figures, selected, runs, everything=not refs)
    elif csv:
        from lbzoo.tables.presenting import as_csv

        typer.echo(as_csv(_standings(tables, selected, runs)), nl=False)
    elif markdown:
        from lbzoo.tables.presenting import as_markdown

        typer.echo("\n".join(as_markdown(standing) for standing in _standings(tables, selected, runs)), nl=False)
    elif not refs:
        _print_list(runs)
    else:
        for index, standing in enumerate(_standings(tables, selected, runs)):
            typer.echo("\n" * bool(index), nl=False)
            _print_table(standing)
        for figure in figures:
            _print_figure(figure)
    return 1 if failed else 0


def _chosen(refs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tables and figures that were asked for, in the papers' order."""
    from fnmatch import fnmatch

    from lbzoo.errors import UnknownNameError
    from lbzoo.tables.paper_tables import figures, table_ids

    tables, known_figures = table_ids(), [figure.id for figure in figures()]
    if not refs:
        return tables, known_figures
    for ref in refs:
        if not any(fnmatch(each, ref) for each in (*tables, *known_figures)):
            raise UnknownNameError("table or figure", ref, [*tables, *known_figures])
    return [each for each in tables if any(fnmatch(each, ref) for ref in refs)], [
        each for each in known_figures if any(fnmatch(each, ref) for ref in refs)
    ]


def _run(
    tables: Sequence[str],
    rows: Sequence[str],
    scale: ScaleName,
    overrides: Sequence[str],
    repeats: int,
    again: bool,
    runs: Path,
    *,
    quiet: bool,
) -> bool:
    """Run the rows; returns whether one failed. What is said goes to stderr where stdout is for a program."""
    from lbzoo.tables.paper_tables import paper_table, select_rows
    from lbzoo.tables.running import run_rows

    chosen = [row for each in tables for row in select_rows(paper_table(each), rows)]
    tally = run_rows(
        chosen,
        scale.value,
        runs=runs,
        overrides=overrides,
        repeats=repeats,
        again=again,
        say=lambda text: typer.echo(text, err=quiet),
    )
    typer.echo(f"{tally}\n", err=quiet)
    if tally.interrupted:
        typer.echo("the same command goes on where this one stopped", err=True)
        raise typer.Exit(130)
    return tally.failed > 0


def _standings(tables: Sequence[str], rows: Sequence[str], runs: Path) -> list[TableStanding]:
    import dataclasses

    from lbzoo.cli.printing import print_notes
    from lbzoo.tables.paper_tables import select_rows
    from lbzoo.tables.standing import table_standing

    standings = []
    for each in tables:
        standing = table_standing(each, runs)
        print_notes(standing.damage)
        if rows:
            numbers = {row.number for row in select_rows(standing.table, rows)}
            kept = tuple(row for row in standing.rows if row.row.number in numbers)
            standing = dataclasses.replace(standing, rows=kept)
        standings.append(standing)
    return standings


def _print_json(
    tables: Sequence[str], figures: Sequence[str], rows: Sequence[str], runs: Path, *, everything: bool
) -> None:
    from lbzoo.cli.printing import print_json
    from lbzoo.tables.exact import exact_checks
    from lbzoo.tables.paper_tables import figures as paper_figures
    from lbzoo.tables.presenting import figure_data, table_data

    data = {"tables": [table_data(each, exact_checks(each.table.id)) for each in _standings(tables, rows, runs)]}
    data["figures"] = [
        # Of all figures at once nothing is computed that needs torch.
        figure_data(each, _recipe_of_figure(each.id), None if everything else exact_checks(each.id))
        for each in paper_figures()
        if each.id in figures
    ]
    print_json(data)


def _print_list(runs: Path) -> None:
    from lbzoo.cli.printing import print_table
    from lbzoo.tables.exact import exact_ids
    from lbzoo.tables.paper_tables import figures, table_ids

    lines = []
    for standing in _standings(table_ids(), [], runs):
        table = standing.table
        status = standing.progress or standing.status
        lines.append([table.id, str(len(table.rows)), status, standing.recipe or "", table.caption, standing.remark])
    for figure in figures():
        status = "computed" if figure.id in exact_ids() else ""
        lines.append([figure.id, "", status, _recipe_of_figure(figure.id) or "", figure.claim, ""])
    print_table(["table", "rows", "status", "recipe", "caption", "remark"], lines)


def _recipe_of_figure(figure: str) -> str | None:
    from lbzoo.recipe.finding import PACKAGE_RECIPES
    from lbzoo.tables.table_files import table_files

    file = table_files().get(figure)
    name = file.recipe if file is not None else None
    return name if name is not None and (PACKAGE_RECIPES / f"{name}.yaml").is_file() else None


def _print_table(standing: TableStanding) -> None:
    from lbzoo.cli.printing import print_table
    from lbzoo.tables.exact import exact_checks
    from lbzoo.tables.presenting import as_cells
    from lbzoo.tables.table_files import table_files

    table, file = standing.table, table_files().get(standing.table.id)
    typer.echo(f"{table.id}: {table.caption}")
    typer.echo(f"{table.model} on {table.dataset}; {_units(standing)}")
    progress = f" ({standing.progress})" if standing.progress else ""
    typer.echo(f"recipe {standing.recipe or 'none'}; status {standing.status}{progress}")
    if standing.remark:
        typer.echo(standing.remark)
    typer.echo()
    print_table(*as_cells(standing))
    for text in _remarks(standing, file.note if file is not None else None):
        typer.echo(text)
    _print_checks(exact_checks(table.id))


def _units(standing: TableStanding) -> str:
    metrics = standing.table.metrics
    return ", ".join(f"{metric.name} in {metric.unit}" for metric in metrics) or "settings, no results"


def _remarks(standing: TableStanding, note: str | None) -> list[str]:
    """What there is to say of the table, of single rows, and of where its numbers were measured."""
    texts = [note, *standing.table.notes] if note else list(standing.table.notes)
    texts += [f"row {row.row.number}: {text}" for row in standing.rows for text in (*row.notes, row.remark)
              if text and text != standing.remark]  # fmt: skip
    ours = [measured for row in standing.rows for measured in row.measured.values()]
    places = dict.fromkeys(f"{each.scale}: measured on {each.machine}, commit {each.commit or 'none'}" for each in ours)
    return [*texts, *places]


def _print_checks(checks: Sequence[ExactCheck]) -> None:
    from lbzoo.cli.printing import aligned

    if not checks:
        return
    typer.echo("\ncomputed, without training:")
    rows = [["", "paper", "computed", ""]]
    rows += [
        [check.what, f"{check.paper:.6g}", f"{check.ours:.6g}", "agrees" if check.agrees else "DIFFERS"]
        for check in checks
    ]
    for line in aligned(rows):
        typer.echo(f"  {line}")


def _print_figure(figure_id: str) -> None:
    from lbzoo.tables.exact import exact_checks
    from lbzoo.tables.paper_tables import figures

    figure = next(each for each in figures() if each.id == figure_id)
    typer.echo(f"{figure.id}: {figure.claim}")
    recipe = _recipe_of_figure(figure_id)
    if recipe is not None:
        typer.echo(f"recipe {recipe}")
    _print_checks(exact_checks(figure_id))
