"""How far the rows of a table have come, and the paper's numbers beside ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lbzoo.errors import UsageError
from lbzoo.recipe.schema import Scale
from lbzoo.tables.paper_tables import PaperRow, PaperTable, Reported, paper_table
from lbzoo.tables.results import Measured, Record, ResultsFile, by_row, measured
from lbzoo.tables.row_layers import logged_metric
from lbzoo.tables.row_recipes import RowRecipe, Unavailable, recipe_of
from lbzoo.tables.table_files import TableFile, table_files

Status = Literal[
    "measured",  # at the paper's scale
    "mini",
    "smoke",
    "running",
    "stale",  # only by another version of the recipe
    "interrupted",
    "failed",
    "unmeasured",
    "not built",
    "not in the zoo",
]
# What a scale is worth, the most first.
_REACHED: Mapping[Scale, Status] = {"paper": "measured", "mini": "mini", "smoke": "smoke"}
_UNAVAILABLE = ("not built", "not in the zoo")


@dataclass(frozen=True)
class RowStanding:
    """A row: what the paper prints, what was measured with the recipe as it is now, and what else there is to say.

    ``paper`` and ``measured`` are by metric and hold values of different types, so that neither can pass for the other.
    """

    row: PaperRow
    recipe: str | None
    """Of what is not built yet, the one that is to be written."""
    status: Status
    remark: str
    notes: tuple[str, ...]
    paper: Mapping[str, Reported]
    measured: Mapping[str, Measured]

    def __post_init__(self) -> None:
        for values, kind in ((self.paper, Reported), (self.measured, Measured)):
            for name, value in values.items():
                if type(value) is not kind:
                    raise TypeError(f"{name}: {type(value).__name__} where a {kind.__name__} belongs")


@dataclass(frozen=True)
class TableStanding:
    """A table: ``status`` is what every row that can be run has reached at least."""

    table: PaperTable
    recipe: str | None
    """The table's own; single rows may have others."""
    status: Status
    remark: str
    rows: tuple[RowStanding, ...]
    damage: tuple[str, ...] = ()
    """Lines of the results file that could not be read."""

    @property
    def progress(self) -> str:
        """``3 mini, 1 stale, 23 unmeasured``; empty where all rows are alike."""
        counts = Counter(row.status for row in self.rows)
        ordered = [(counts[status], status) for status in get_args(Status) if counts[status]]
        return ", ".join(f"{count} {status}" for count, status in ordered) if len(ordered) > 1 else ""


def table_standing(table_id: str, runs: Path, files: Mapping[str, TableFile] | None = None) -> TableStanding:
    """The table with its results below ``runs``. Raises UsageError where there is no such table."""
    table = paper_table(table_id)
    files = table_files() if files is None else files
    file = files.get(table_id)
    results = ResultsFile(runs, table_id)
    records = by_row(results.latest().values())
    rows = tuple(_row_standing(row, file, records.get(row.label, []), files) for row in table.rows)
    remarks = dict.fromkeys(row.remark for row in rows if row.status in _UNAVAILABLE)
    status = _least([row.status for row in rows])
    return TableStanding(
        table=table,
        recipe=_main_recipe(file, [row.recipe for row in rows if row.recipe]),
        status=status,
        remark="; ".join(remarks) if status in _UNAVAILABLE else "",
        rows=rows,
        damage=tuple(results.damage),
    )


def is_current(recipe: RowRecipe, record: Record) -> bool:
    """Whether the record is of the recipe as it is now."""
    try:
        overrides = [f"seed={record.seed}"]
        return recipe.load(record.scale, overrides).hash == record.recipe_hash
    except UsageError:  # a recipe that is broken now has no results
        return False


def _row_standing(
    row: PaperRow, file: TableFile | None, records: Sequence[Record], files: Mapping[str, TableFile]
) -> RowStanding:
    recipe = recipe_of(row, files)
    paper = {reported.metric.name: reported for reported in row.reported}
    notes = tuple(note for note in (row.note, *recipe.notes) if note)
    if isinstance(recipe, Unavailable):
        return RowStanding(row, recipe.name, recipe.kind, recipe.reason, notes, paper, {})
    assert file is not None
    current = [record for record in records if is_current(recipe, record)]
    stale = [record for record in records if record not in current]
    status, remark = _status(current, stale)
    values: dict[str, Measured] = {}
    for scale in ("paper", "mini"):  # what two steps come to is no result
        at_scale = [record for record in current if record.scale == scale]
        for reported in row.reported:
            value = measured(reported.metric, logged_metric(file, reported.metric.name), at_scale)
            if value is not None:
                values.setdefault(reported.metric.name, value)
    return RowStanding(row, recipe.name, status, remark, notes, paper, values)


def _status(current: Sequence[Record], stale: Sequence[Record]) -> tuple[Status, str]:
    """The furthest that the row has come, and what else happened to it."""
    reached: Status | None = None
    remarks = []
    for scale, status in _REACHED.items():
        at_scale = [record for record in current if record.scale == scale]
        if reached is None and any(record.standing in ("finished", "diverged") for record in at_scale):
            reached = status
        remarks += [_remark(record) for record in at_scale if record.standing != "finished"]
        if any(record.other_samples for record in at_scale):
            remarks.append(f"{scale}: on another number of training samples than the recipe's data has")
    remarks += [f"{record.scale}: stale, of another version of the recipe ({record.time[:10]})" for record in stale]
    remark = "; ".join(dict.fromkeys(remarks))
    if reached is not None:
        return reached, remark
    for standing in ("running", "interrupted", "failed"):
        if any(record.standing == standing for record in current):
            return standing, remark
    return ("stale" if stale else "unmeasured"), remark


def _remark(record: Record) -> str:
    said = f"{record.scale}: {record.standing}"
    if record.standing in ("interrupted", "diverged") and record.step:
        said += f" at step {record.step:,}"
    reason = (record.error or "").strip().partition("\n")[0]
    return f"{said}: {reason}" if reason else said


def _main_recipe(file: TableFile | None, names: Sequence[str]) -> str | None:
    """The file's recipe, or the one of most rows where no row has that."""
    if file is not None and file.recipe in names:
        return file.recipe
    return Counter(names).most_common(1)[0][0] if names else None


def _least(found: Sequence[Status]) -> Status:
    """What all rows have reached: rows that cannot be run say nothing unless there are no others."""
    runnable = [status for status in found if status not in _UNAVAILABLE]
    if not runnable:
        return "not built" if "not built" in found else "not in the zoo"
    order: list[Status] = ["unmeasured", "failed", "interrupted", "stale", "running", "smoke", "mini", "measured"]
    return min(runnable, key=order.index)
