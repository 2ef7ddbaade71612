"""Tables as data for programs: JSON, CSV and Markdown. The paper's numbers and ours never share a column."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbzoo.tables.exact import ExactCheck
from lbzoo.tables.paper_tables import PaperFigure, Reported, cell_text
from lbzoo.tables.results import Measured
from lbzoo.tables.standing import RowStanding, TableStanding

CSV_COLUMNS = (
    "table", "row", "key", "recipe", "cited", "status", "remark", "metric", "unit", "paper", "measured", "spread", "n",
    "scale", "machine", "commit",
)  # fmt: skip
# Columns that say how a paper came to its numbers rather than what was run.
_HIDDEN = {"delta_reported_pp", "gap_reduction_reported_pct", "time", "last_step", "last_loss"}


def table_data(standing: TableStanding, checks: Sequence[ExactCheck] = ()) -> dict[str, Any]:
    """A table as JSON-able data; see docs/tables.md for the keys."""
    table = standing.table
    return {
        "id": table.id,
        "paper": table.paper,
        "kind": table.kind,
        "caption": table.caption,
        "model": table.model,
        "dataset": table.dataset,
        "recipe": standing.recipe,
        "status": standing.status,
        "progress": standing.progress,
        "remark": standing.remark,
        "rows": [_row_data(row) for row in standing.rows],
        "exact": [check_data(check) for check in checks],
        "damage": list(standing.damage),
    }


def figure_data(figure: PaperFigure, recipe: str | None, checks: Sequence[ExactCheck] | None) -> dict[str, Any]:
    """A figure as JSON-able data; ``checks`` is None where they were not computed."""
    data = {"id": figure.id, "paper": figure.paper, "claim": figure.claim, "recipe": recipe}
    return data if checks is None else {**data, "exact": [check_data(check) for check in checks]}


def check_data(check: ExactCheck) -> dict[str, Any]:
    return {
        "what": check.what,
        "paper": check.paper,
        "computed": check.ours,
        "tolerance": check.tolerance,
        "agrees": check.agrees,
    }


def as_csv(standings: Iterable[TableStanding]) -> str:
    """One line for each row and metric of the tables."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for standing in standings:
        for row in standing.rows:
            writer.writerows(_csv_lines(standing, row))
    return text.getvalue()


def as_markdown(standing: TableStanding) -> str:
    """The table in Markdown, under a heading with its caption and status."""
    columns, rows = as_cells(standing)
    head = [f"### {standing.table.id}: {standing.table.caption}", "", f"Recipe: {standing.recipe or 'none'}. Status: "]
    head[-1] += standing.status + (f" ({standing.progress})" if standing.progress else "") + "."
    if standing.remark:
        head.append(standing.remark + ".")
    lines = [_pipes(columns), _pipes(["---"] * len(columns)), *(_pipes(row) for row in rows)]
    return "\n".join([*head, "", *lines, ""])


def as_cells(standing: TableStanding) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: number, what was run, the paper's results, ours, and how far the row has come."""
    settings = _shown_settings(standing)
    metrics = [metric.name for metric in standing.table.metrics]
    scales = {measured.scale for row in standing.rows for measured in row.measured.values()}
    ours = sorted({name for row in standing.rows for name in row.measured}, key=metrics.index) if scales else []
    scale = f" ({scales.pop()})" if len(scales) == 1 else ""
    columns = ["#", *settings, *(f"paper {name}" for name in metrics)]
    columns += [f"measured {name}{scale}" for name in ours] + ["status"]
    return columns, [_cells(row, settings, metrics, ours, bool(scale)) for row in standing.rows]


def _row_data(row: RowStanding) -> dict[str, Any]:
    return {
        "number": row.row.number,
        "key": dict(row.row.key),
        "settings": dict(row.row.settings),
        "recipe": row.recipe,
        "cited": row.row.cited,
        "diverged": row.row.diverged,
        "status": row.status,
        "remark": row.remark,
        "notes": list(row.notes),
        "paper": {name: reported.value for name, reported in row.paper.items()},
        "measured": {name: _measured_data(measured) for name, measured in row.measured.items()},
    }


def _measured_data(measured: Measured) -> dict[str, Any]:
    return {
        "value": measured.value,
        "spread": measured.spread,
        "n": measured.n,
        "unit": measured.metric.unit,
        "scale": measured.scale,
        "machine": measured.machine,
        "commit": measured.commit,
        "runs": list(measured.runs),
    }


def _csv_lines(standing: TableStanding, row: RowStanding) -> Iterable[Mapping[str, Any]]:
    shared = {
        "table": standing.table.id,
        "row": row.row.number,
        "key": row.row.label,
        "recipe": row.recipe or "",
        "cited": row.row.cited,
        "status": row.status,
        "remark": row.remark,
    }
    if not row.paper:
        yield shared
    for name, reported in row.paper.items():
        line = {**shared, "metric": name, "unit": reported.metric.unit, "paper": _number(reported.value)}
        ours = row.measured.get(name)
        if ours is not None:
            line |= {"measured": measured_text(ours), "spread": _number(ours.spread), "n": ours.n}
            line |= {"scale": ours.scale, "machine": ours.machine, "commit": ours.commit or ""}
        yield line


def _shown_settings(standing: TableStanding) -> list[str]:
    """The key columns and the table's other columns that say what was run."""
    rows = [row.row for row in standing.rows]
    wanted = [*(column for row in rows for column in row.key), *standing.table.columns]
    held = {column for row in rows for column in row.settings}
    return [column for column in dict.fromkeys(wanted) if column in held and column not in _HIDDEN]


def _cells(
    row: RowStanding, settings: Sequence[str], metrics: Sequence[str], ours: Sequence[str], one_scale: bool
) -> list[str]:
    cells = [str(row.row.number)]
    cells += [cell_text(row.row.settings.get(column, "")) for column in settings]
    cells += [_paper_text(row.paper.get(name)) for name in metrics]
    for name in ours:
        value = row.measured.get(name)
        cells.append("" if value is None else measured_text(value) + ("" if one_scale else f" ({value.scale})"))
    status = "cited, " + row.status if row.row.cited else row.status
    return [*cells, status]


def _paper_text(reported: Reported | None) -> str:
    if reported is None:
        return ""
    return "diverged" if reported.value is None else f"{reported.value:.6g}"


def measured_text(measured: Measured) -> str:
    """``76.2``, ``76.2 +- 0.1 (n 5)``, or ``diverged``."""
    if measured.value is None:
        return "diverged"
    text = f"{measured.value:.4g}"
    return text if measured.spread is None else f"{text} +- {measured.spread:.2g} (n {measured.n})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
