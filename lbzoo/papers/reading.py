"""Reading the papers' data, and finding tables and rows in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lbzoo.errors import UnknownNameError, UsageError, did_you_mean

PAPERS = ("lamb", "lans", "novograd", "vrgd")
_FOLDER = Path(__file__).parent
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster, where PyYAML has it


@functools.cache
def load_paper(key: str) -> dict[str, Any]:
    """A paper's data by its key: ``lamb``, ``lans``, ``novograd`` or ``vrgd``. It is read once; do not change it."""
    if key not in PAPERS:
        raise UnknownNameError("paper", key, PAPERS)
    data: dict[str, Any] = yaml.load((_FOLDER / f"{key}.yaml").read_text(encoding="utf-8"), Loader=_Loader)
    return data


def find_table(table_id: str) -> dict[str, Any]:
    """The table ``paper/number``, such as ``novograd/3``. Raises UsageError."""
    tables = {table["id"]: table for table in load_paper(table_id.partition("/")[0])["tables"]}
    if table_id not in tables:
        raise UnknownNameError("table", table_id, tables)
    found: dict[str, Any] = tables[table_id]
    return found


def find_rows(table_id: str, columns: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The rows of a table that hold these values, each with the table's fixed settings filled in.

    Raises UsageError for a column that no row of the table has.
    """
    table = find_table(table_id)
    rows = [{**table["fixed"], **row} for row in table["rows"]]
    known = sorted({key for row in rows for key in row})
    for column in columns or {}:
        if column not in known:
            raise UsageError(f"table {table_id} has no column '{column}'{did_you_mean(column, known)}")
    return [row for row in rows if all(row.get(column) == value for column, value in (columns or {}).items())]
