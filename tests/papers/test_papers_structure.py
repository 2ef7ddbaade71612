"""The papers' data is whole, and no accident of YAML has changed it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lbzoo.papers
from lbzoo.errors import UsageError
from lbzoo.papers import PAPERS, find_rows, find_table, load_paper

ROWS = {
    "lans": [2, 3],
    "lamb": [9, 14, 8, 7, 7, 5, 5, 9, 27, 27, 11, 19] + [20] * 13,
    "vrgd": [15, 25, 6, 10, 48],
    "novograd": [7, 9, 3, 3, 5, 3, 3],
}
CITED = {"lans": 1, "lamb": 2, "vrgd": 29, "novograd": 6}
DIVERGED = {"lans": 1, "lamb": 5, "vrgd": 0, "novograd": 0}
LEAST_CONTRADICTIONS = {"lans": 6, "lamb": 12, "vrgd": 10, "novograd": 10}
FIGURES = {
    "lans": {"lans/fig1"},
    "lamb": {"lamb/fig2", "lamb/fig3", "lamb/fig8"},
    "vrgd": {"vrgd/fig2", "vrgd/fig3", "vrgd/linreg"},
    "novograd": {"novograd/fig1", "novograd/fig2"},
}
SECTIONS = {
    "schema_version",
    "paper",
    "tables",
    "figures",
    "algorithms",
    "setup",
    "not_stated",
    "contradictions",
    "derived",
    "external",
}
TABLE_KEYS = {"kind", "caption", "model", "dataset", "metric", "fixed", "columns", "rows"}
NULLABLE = {"f1", "time_minutes", "weight_decay", "lr", "epochs", "metric"}
FLOATS = ("lr", "weight_decay", "l2_regularization", "warmup_ratio", "warmup_epochs")
LARGEST = {"fraction": 1, "percent": 100}

papers = pytest.mark.parametrize("key", PAPERS)
tables = pytest.mark.parametrize("table_id", [table["id"] for key in PAPERS for table in load_paper(key)["tables"]])


@papers
def test_sections(key: str) -> None:
    data = load_paper(key)
    assert set(data) >= SECTIONS
    assert data["schema_version"] == 1
    paper = data["paper"]
    assert paper["key"] == key
    assert re.fullmatch(r"\d{4}\.\d{5}", str(paper["arxiv"]))
    assert paper["title"]
    assert len(paper["authors"]) >= 4


@papers
def test_counts(key: str) -> None:
    data = load_paper(key)
    assert [table["id"] for table in data["tables"]] == [f"{key}/{n + 1}" for n in range(len(ROWS[key]))]
    assert [len(table["rows"]) for table in data["tables"]] == ROWS[key]
    rows = [row for table in data["tables"] for row in table["rows"]]
    assert sum(bool(row.get("cited")) for row in rows) == CITED[key]
    assert sum(bool(row.get("diverged")) for row in rows) == DIVERGED[key]
    assert {each["id"] for each in data["figures"]} >= FIGURES[key]


@papers
def test_remarks_are_complete(key: str) -> None:
    data = load_paper(key)
    assert all("claim" in each for each in data["figures"])
    contradictions = [each["id"] for each in data["contradictions"]]
    assert len(contradictions) == len(set(contradictions)) >= LEAST_CONTRADICTIONS[key]
    assert all({"where", "issue", "recommended", "reason"} <= set(each) for each in data["contradictions"])
    settings = [each["key"] for each in data["setup"]]
    assert len(settings) == len(set(settings))
    assert all({"value", "section"} <= set(each) for each in data["setup"])
    for each in data["external"]:
        assert "source" in each
        assert "values" in each or each["status"] == "not_found"


@papers
def test_no_accidents_of_yaml(key: str) -> None:
    """A stray comma in a flow mapping makes an odd key or a null."""
    for path, value in _walk(load_paper(key), (key,)):
        name = path[-1]
        assert re.fullmatch(r"[A-Za-z0-9_./+-]+", str(name)), path
        assert value is not None or name in NULLABLE, path


@papers
def test_no_absolute_paths(key: str) -> None:
    text = (Path(lbzoo.papers.__file__).parent / f"{key}.yaml").read_text(encoding="utf-8")
    assert re.search(r"(?m)(^|[\s\"'(=])/[a-z]+/[a-z]", text) is None


@tables
def test_table(table_id: str) -> None:
    table = find_table(table_id)
    assert set(table) >= TABLE_KEYS
    assert table["kind"] in ("results", "tuning", "hyperparameters")
    assert (table["metric"] is None) == (table["kind"] == "hyperparameters")
    for metric in _metrics(table):
        assert isinstance(metric["higher_is_better"], bool)
        assert metric["unit"]


@tables
def test_rows(table_id: str) -> None:
    table = find_table(table_id)
    for row, full in zip(table["rows"], find_rows(table_id), strict=True):
        assert isinstance(full["optimizer"], str)
        batch = full.get("batch_size", full.get("batch_tokens"))
        sizes = list(batch.values()) if isinstance(batch, dict) else [batch]
        assert all(type(size) is int and size > 0 for size in sizes)
        assert not isinstance(batch, dict) or set(batch) == {"phase1", "phase2"}
        assert all(type(full[key]) is float for key in FLOATS if full.get(key) is not None)
        for metric in _metrics(table):
            _check_value(row[metric["name"]], metric["unit"], diverged=full.get("diverged", False))


def _check_value(value: Any, unit: str, *, diverged: bool) -> None:
    if value is None:
        assert diverged
        return
    assert isinstance(value, float)
    assert math.isfinite(value)
    assert unit not in LARGEST or 0 <= value <= LARGEST[unit]


def _metrics(table: dict[str, Any]) -> list[dict[str, Any]]:
    return ([table["metric"]] if table["metric"] else []) + table.get("other_metrics", [])


def _walk(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _walk(value, (*path, key))


def test_reading_names_what_is_not_there() -> None:
    with pytest.raises(UsageError, match="no paper named 'nvograd'; did you mean 'novograd'"):
        load_paper("nvograd")
    with pytest.raises(UsageError, match="no table named 'lans/3'"):
        find_table("lans/3")
    with pytest.raises(UsageError, match="has no column 'batchsize'; did you mean 'batch_size'"):
        find_rows("lans/1", {"batchsize": 1})
