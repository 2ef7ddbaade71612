"""The papers' tables as objects: rows with a key that tells them apart, and the numbers that the paper prints.

A number from a paper is a :class:`Reported`, one of ours a ``results.Measured``; nothing turns one into the other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.papers import PAPERS, find_table, load_paper


@dataclass(frozen=True)
class Metric:
    """A column of results: its name in the paper's data, and the unit it is printed in."""

    name: str
    unit: str
    higher_is_better: bool

    @property
    def of_a_fraction(self) -> float:
        """What a value as the engine logs it is multiplied by: it logs fractions where papers print percent."""
        return 100.0 if self.unit in ("percent", "percentage points") else 1.0


@dataclass(frozen=True)
class Reported:
    """A number as a paper prints it, in the metric's unit; None where the run diverged or the cell is damaged."""

    metric: Metric
    value: float | None


@dataclass(frozen=True)
class PaperRow:
    """A row of a table. ``number`` counts from 1; ``key`` holds the columns that tell the table's rows apart.

    ``settings`` is everything but results: the table's fixed values, the row's own, and for the best of several tuning
    runs those of the best run.
    """

    table: str
    number: int
    key: Mapping[str, Any]
    settings: Mapping[str, Any]
    reported: tuple[Reported, ...]
    cited: bool
    diverged: bool
    note: str

    @property
    def label(self) -> str:
        """``optimizer=lamb,batch_size=512``"""
        return ",".join(f"{column}={cell_text(value)}" for column, value in self.key.items())

    @property
    def slug(self) -> str:
        """A file name: ``02-lamb-512``."""
        values = "-".join(cell_text(value) for value in self.key.values())
        return f"{self.number:02d}-" + re.sub(r"[^a-z0-9.+]+", "-", values.lower()).strip("-")


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper. ``kind`` is ``results``, ``tuning`` or ``hyperparameters``; the last has no metrics."""

    id: str
    paper: str
    kind: str
    caption: str
    model: str
    dataset: str
    metrics: tuple[Metric, ...]
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PaperFigure:
    """A figure, or an algorithm, with a claim that can be checked."""

    id: str
    paper: str
    claim: str
    section: str


def table_ids() -> list[str]:
    return [table["id"] for paper in PAPERS for table in load_paper(paper)["tables"]]


@functools.cache
def paper_table(table_id: str) -> PaperTable:
    """The table ``paper/number``. Raises UsageError with the nearest names."""
    if table_id not in table_ids():
        raise UnknownNameError("table", table_id, table_ids())
    data = find_table(table_id)
    printed = [data["metric"]] if data["metric"] else []
    metrics = tuple(
        Metric(each["name"], each["unit"], each["higher_is_better"])
        for each in [*printed, *data.get("other_metrics", [])]
    )
    columns = _key_columns(data, {metric.name for metric in metrics})
    rows = tuple(_row(data, number, columns, metrics) for number in range(1, len(data["rows"]) + 1))
    return PaperTable(
        id=table_id,
        paper=table_id.partition("/")[0],
        kind=data["kind"],
        caption=data["caption"],
        model=data["model"],
        dataset=data["dataset"],
        metrics=metrics,
        columns=tuple(column for column in data["columns"] if column not in {metric.name for metric in metrics}),
        rows=rows,
        notes=tuple(data.get("notes", ())),
    )


@functools.cache
def figures() -> tuple[PaperFigure, ...]:
    """The papers' figures with a claim, and NovoGrad's algorithm, which claims half of Adam's memory."""
    found = [
        PaperFigure(figure["id"], paper, figure["claim"], str(figure.get("section", "")))
        for paper in PAPERS
        for figure in load_paper(paper)["figures"]
    ]
    memory = "State is one tensor and one scalar a layer: half of Adam's memory."
    return (*found, PaperFigure("novograd/alg1", "novograd", memory, "3"))


def select_rows(table: PaperTable, selectors: Iterable[str]) -> list[PaperRow]:
    """The rows that the selectors name, in the table's order; all of them where there is no selector.

    A selector is row numbers (``3``, ``1-4,7``) or values of columns, all of which must hold
    (``optimizer=lamb,batch_size=512``); several selectors add up. Raises UsageError.
    """
    selectors = list(selectors)
    if not selectors:
        return list(table.rows)
    chosen: set[int] = set()
    for selector in selectors:
        chosen |= _chosen(table, selector)
    return [row for row in table.rows if row.number in chosen]


def one_row(table: PaperTable, selector: str | None) -> PaperRow:
    """The one row that a selector names. Raises UsageError that lists the rows."""
    if selector is None and len(table.rows) > 1:
        raise UsageError(f"table {table.id} has {len(table.rows)} rows; say which with --row:\n{_listed(table.rows)}")
    found = select_rows(table, [selector] if selector is not None else [])
    if len(found) != 1:
        raise UsageError(f"{len(found)} rows of {table.id} hold {selector}; say which:\n{_listed(found)}")
    return found[0]


def cell_text(value: Any) -> str:
    """A cell as text: ``65536/32768`` for the two phases of a run, ``warmup+lars`` for a list."""
    if isinstance(value, Mapping):
        return "/".join(cell_text(part) for part in value.values())
    if isinstance(value, list | tuple):
        return "+".join(cell_text(part) for part in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _row(data: Mapping[str, Any], number: int, columns: list[str], metrics: tuple[Metric, ...]) -> PaperRow:
    row = data["rows"][number - 1]
    names = {metric.name for metric in metrics}
    own = {column: value for column, value in {**data["fixed"], **row}.items() if column not in names}
    return PaperRow(
        table=data["id"],
        number=number,
        key={column: row[column] for column in columns if column in row},
        settings={**_of_the_best_run(row), **own},
        reported=tuple(Reported(metric, row[metric.name]) for metric in metrics if metric.name in row),
        cited=bool(row.get("cited")),
        diverged=bool(row.get("diverged")),
        note=str(row.get("note", "")),
    )


def _of_the_best_run(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the best run of the tuning tables that a row is the best of."""
    tables = [find_table(table_id) for table_id in row.get("best_of", ())]
    runs = [(table, run) for table in tables for run in table["rows"]]
    if not runs:
        return {}
    name = tables[0]["metric"]["name"]
    assert all(table["metric"]["name"] == name and table["metric"]["higher_is_better"] for table in tables)
    table, best = max(runs, key=lambda each: each[1][name])
    return {column: value for column, value in {**table["fixed"], **best}.items() if column != name}


def _key_columns(data: Mapping[str, Any], results: set[str]) -> list[str]:
    """The first columns of a table that together tell all of its rows apart."""
    chosen: list[str] = []
    for column in data["columns"]:
        if column not in results and _distinct(data, [*chosen, column]) > _distinct(data, chosen):
            chosen.append(column)
    if _distinct(data, chosen) < len(data["rows"]):
        raise AssertionError(f"{data['id']}: rows cannot be told apart by {chosen}")
    return chosen


def _distinct(data: Mapping[str, Any], columns: list[str]) -> int:
    return len({tuple(cell_text(row.get(column, "")) for column in columns) for row in data["rows"]})


def _chosen(table: PaperTable, selector: str) -> set[int]:
    numbers = {row.number for row in table.rows}
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", selector):
        chosen: set[int] = set()
        for part in selector.split(","):
            first, _, last = part.partition("-")
            chosen |= set(range(int(first), int(last or first) + 1))
        if not chosen <= numbers:
            raise UsageError(f"table {table.id} has rows 1 to {max(numbers)}, not {min(chosen - numbers)}")
        return chosen
    wanted = dict(_column_and_value(table, part) for part in selector.split(","))
    found = {row.number for row in table.rows if all(_holds(row, *item) for item in wanted.items())}
    if not found:
        raise UsageError(f"no row of table {table.id} holds {selector}; its rows:\n{_listed(table.rows)}")
    return found


def _column_and_value(table: PaperTable, part: str) -> tuple[str, str]:
    column, equals, value = part.partition("=")
    if not equals:
        raise UsageError(f"'{part}': name rows by number (3, 1-4) or by column (batch_size=512,optimizer=lamb)")
    known = {name for row in table.rows for name in row.settings}
    if column not in known:
        raise UnknownNameError(f"column of {table.id}", column, known)
    return column, value


def _holds(row: PaperRow, column: str, text: str) -> bool:
    value = row.settings.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == float(value)
        except ValueError:
            return False
    return cell_text(value).lower() == text.lower()


def _listed(rows: Iterable[PaperRow]) -> str:
    rows = list(rows)
    lines = [f"  {row.number:>3}  {row.label}" for row in rows[:30]]
    return "\n".join(lines) + (f"\n  ... ({len(rows)} in all)" if len(rows) > 30 else "")
