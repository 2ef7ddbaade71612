"""What is shown of results: current ones only, never a paper's number as a measured one."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_fit import FakeFit

import lbzoo.papers.reading as reading
from lbzoo.tables import paper_tables
from lbzoo.tables.paper_tables import paper_table
from lbzoo.tables.presenting import CSV_COLUMNS, as_cells, as_csv, as_markdown, table_data
from lbzoo.tables.results import Measured, Record, ResultsFile
from lbzoo.tables.running import run_rows
from lbzoo.tables.standing import RowStanding, table_standing

PLANTED = 0.123456789


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LAMB table 5 with a number in it that nothing else can come to."""
    load = reading.load_paper
    data = copy.deepcopy(load("lamb"))
    table = next(each for each in data["tables"] if each["id"] == "lamb/5")
    for row in table["rows"]:
        row["top1"] = row["top5"] = PLANTED
    for module in (reading, paper_tables):
        monkeypatch.setattr(module, "load_paper", lambda key: data if key == "lamb" else load(key))
    paper_table.cache_clear()
    yield table
    paper_table.cache_clear()


def shown(planted_rows: int, runs: Path) -> None:
    """The planted number stands in the papers' places of every format, and in no other."""
    standing = table_standing("lamb/5", runs)
    data = table_data(standing)
    assert json.dumps(data).count(str(PLANTED)) == 2 * planted_rows
    for row in data["rows"]:
        assert row["paper"] == {"top1": PLANTED, "top5": PLANTED}
        assert str(PLANTED) not in json.dumps(row["measured"])
    header, *lines = (line.split(",") for line in as_csv([standing]).splitlines() if '"' not in line)
    assert tuple(header) == CSV_COLUMNS
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        assert cells.pop("paper") == f"{PLANTED:.8g}"
        assert "0.1234" not in "".join(cells.values())
    columns, rows = as_cells(standing)
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            assert ("0.1234" in cell) == column.startswith("paper "), (column, cell)
    assert as_markdown(standing).count("0.1234") == 2 * planted_rows


def test_a_planted_paper_number_is_never_measured(planted: Any, tmp_path: Path, fit: FakeFit) -> None:
    shown(7, tmp_path)
    fit.answer = lambda recipe: {"val/top1": 0.5, "val/top5": 0.75}
    run_rows(paper_table("lamb/5").rows[:3], "mini", runs=tmp_path, fit=fit)
    shown(7, tmp_path)
    measured = table_standing("lamb/5", tmp_path).rows[0].measured
    assert (measured["top1"].value, measured["top1"].scale) == (0.5, "mini")


def test_types_keep_them_apart() -> None:
    row = paper_table("lamb/5").rows[0]
    reported = {each.metric.name: each for each in row.reported}
    with pytest.raises(TypeError, match="top1: Reported where a Measured belongs"):
        RowStanding(row, None, "unmeasured", "", (), reported, measured=reported)  # type: ignore[arg-type]
    measured = Measured(row.reported[0].metric, 0.5, None, 1, "mini", "", None, ())
    with pytest.raises(TypeError, match="top1: Measured where a Reported belongs"):
        RowStanding(row, None, "unmeasured", "", (), {"top1": measured}, {})  # type: ignore[dict-item]


def append(runs: Path, **values: Any) -> None:
    """A line as somebody might write it by hand."""
    path = runs / "tables" / "lamb" / "5.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def test_a_number_written_by_hand_is_no_result(tmp_path: Path, fit: FakeFit) -> None:
    """Without a run it is refused; with a run that says otherwise too."""
    top1 = paper_table("lamb/5").rows[0].reported[0].value
    append(tmp_path, row="batch_size=512", scale="paper", metrics={"val/top1": top1})
    run_rows(paper_table("lamb/5").rows[:1], "mini", runs=tmp_path, fit=fit)
    done = ResultsFile(tmp_path, "lamb/5").records()[-1]
    append(tmp_path, **{**dataclasses.asdict(done), "run": None, "metrics": {"val/top1": top1}})
    append(tmp_path, **{**dataclasses.asdict(done), "metrics": {"val/top1": top1}})
    append(tmp_path, **{**dataclasses.asdict(done), "metrics": {"val/top1": "0.7696"}})
    standing = table_standing("lamb/5", tmp_path)
    assert standing.rows[0].measured["top1"].value == 0.5
    assert [text.partition(": ")[0].rpartition(":")[2] for text in standing.damage] == ["1", "4", "5", "6"]
    assert "not a record of a run" in standing.damage[0]
    assert "without the run that it came from" in standing.damage[1]
    assert "status.json says" in standing.damage[2]


def test_another_version_of_the_recipe_makes_a_result_stale(tmp_path: Path, fit: FakeFit) -> None:
    run_rows(paper_table("lamb/5").rows, "mini", runs=tmp_path, fit=fit)
    results = ResultsFile(tmp_path, "lamb/5")
    results.append(dataclasses.replace(results.records()[1], recipe_hash="0" * 16))
    standing = table_standing("lamb/5", tmp_path)
    row = standing.rows[0]
    assert (row.status, row.measured) == ("stale", {})
    assert row.remark.startswith("mini: stale, of another version of the recipe (20")
    assert (standing.status, standing.progress) == ("stale", "6 mini, 1 stale")
    assert run_rows(paper_table("lamb/5").rows, "mini", runs=tmp_path, fit=fit).ran == 1, "stale rows are run again"
    assert table_standing("lamb/5", tmp_path).status == "mini"


def test_the_paper_s_scale_counts_more_than_mini(tmp_path: Path, fit: FakeFit) -> None:
    rows = paper_table("lamb/5").rows
    run_rows(rows, "mini", runs=tmp_path, fit=fit)
    fit.answer = lambda recipe: {"val/top1": 0.77}
    run_rows(rows[:1], "paper", runs=tmp_path, fit=fit)
    standing = table_standing("lamb/5", tmp_path)
    assert (standing.rows[0].status, standing.rows[0].measured["top1"].scale) == ("measured", "paper")
    assert (standing.status, standing.progress) == ("mini", "1 measured, 6 mini"), "a table is as far as its last row"
    columns, cells = as_cells(standing)
    assert columns[-3:] == ["measured top1", "measured top5", "status"]
    assert cells[0][-3:] == ["0.77 (paper)", "0.75 (mini)", "measured"]
    run_rows(rows, "paper", runs=tmp_path, fit=fit)
    assert table_standing("lamb/5", tmp_path).status == "measured"


def test_percent_where_the_paper_prints_percent(tmp_path: Path, fit: FakeFit) -> None:
    run_rows(paper_table("novograd/3").rows[:1], "mini", runs=tmp_path, fit=fit)
    assert table_standing("novograd/3", tmp_path).rows[0].measured["top1"].value == 50.0


def test_a_mean_is_not_taken_over_the_runs_that_converged(tmp_path: Path, fit: FakeFit) -> None:
    row = paper_table("lamb/5").rows[0]
    run_rows([row], "mini", runs=tmp_path, fit=fit, repeats=2)
    results = ResultsFile(tmp_path, "lamb/5")
    results.append(dataclasses.replace(results.records()[-1], state="diverged", metrics={}))
    measured = table_standing("lamb/5", tmp_path).rows[0].measured["top1"]
    assert (measured.value, measured.n) == (None, 2)


def test_a_run_that_logged_less_is_no_run_that_diverged(tmp_path: Path, fit: FakeFit) -> None:
    """What callbacks log is no part of a recipe's hash."""
    row = paper_table("lamb/5").rows[0]
    run_rows([row], "mini", runs=tmp_path, fit=fit, repeats=2)
    fit.answer = lambda recipe: {"val/top1": 0.7}
    run_rows([row], "mini", runs=tmp_path, fit=fit, again=True)
    measured = table_standing("lamb/5", tmp_path).rows[0].measured
    assert (measured["top1"].value, measured["top1"].n) == (pytest.approx(0.6), 2)
    assert (measured["top5"].value, measured["top5"].n) == (0.75, 1)


def test_a_result_on_other_data_says_so(tmp_path: Path, fit: FakeFit) -> None:
    """A folder with a hundred images in ImageNet's layout trains the row as well."""
    row = paper_table("lamb/5").rows[0]
    run_rows([row], "paper", runs=tmp_path, fit=fit)
    assert table_standing("lamb/5", tmp_path).rows[0].remark == ""
    fit.trained_hash = "0" * 16
    run_rows([row], "paper", runs=tmp_path, fit=fit, again=True)
    standing = table_standing("lamb/5", tmp_path)
    assert standing.rows[0].status == "measured"
    assert standing.rows[0].remark == "paper: on another number of training samples than the recipe's data has"


def test_every_machine_and_commit_of_a_mean_is_named(tmp_path: Path, fit: FakeFit) -> None:
    row = paper_table("lamb/5").rows[0]
    run_rows([row], "mini", runs=tmp_path, fit=fit, repeats=2)
    results = ResultsFile(tmp_path, "lamb/5")
    last = results.records()[-1]
    results.append(dataclasses.replace(last, machine="another", commit="c0ffee"))
    measured = table_standing("lamb/5", tmp_path).rows[0].measured["top1"]
    assert measured.machine == f"{last.machine}, another"
    assert measured.commit == (f"{last.commit}, c0ffee" if last.commit else "c0ffee")


def test_a_finished_run_with_a_metric_that_is_nan_is_a_result(tmp_path: Path, fit: FakeFit) -> None:
    fit.answer = lambda recipe: {"val/top1": 0.1, "val/top5": math.nan}
    row = paper_table("lamb/5").rows[0]
    run_rows([row], "mini", runs=tmp_path, fit=fit)
    standing = table_standing("lamb/5", tmp_path)
    assert (standing.damage, standing.rows[0].status) == ((), "mini")
    assert standing.rows[0].measured["top1"].value == 0.1
    assert run_rows([row], "mini", runs=tmp_path, fit=fit).kept == 1


def test_a_line_cut_short_costs_only_itself(tmp_path: Path, fit: FakeFit) -> None:
    run_rows(paper_table("lamb/5").rows[:1], "mini", runs=tmp_path, fit=fit)
    results = ResultsFile(tmp_path, "lamb/5")
    with results.path.open("a") as file:
        file.write('{"table": "lamb/5", "row"')
    results.append(dataclasses.replace(results.records()[-1], seed=1))
    assert len(results.records()) == 3
    assert len(results.damage) == 1
    assert results.damage[0].startswith(f"{results.path}:3: left out: ")


def test_a_record_is_read_back_as_it_was(tmp_path: Path, fit: FakeFit) -> None:
    run_rows(paper_table("lamb/5").rows[:1], "mini", runs=tmp_path, fit=fit)
    results = ResultsFile(tmp_path, "lamb/5")
    record = results.records()[-1]
    results.append(record)
    assert results.records()[-1] == record
    assert isinstance(record, Record)


def test_not_built_tables_say_what_is_missing(tmp_path: Path) -> None:
    standing = table_standing("lamb/4", tmp_path)
    if standing.status == "not built":  # until its task is
        assert standing.remark.startswith("not built yet: ")
        assert {row.status for row in standing.rows} == {"not built"}
