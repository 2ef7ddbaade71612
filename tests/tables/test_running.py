"""Running rows: resumable at the row, one failure does not stop the rest, smoke runs each kind of recipe once."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_fit import FakeFit, lines_of

from lbzoo.errors import DataError, LbzooError, UsageError
from lbzoo.tables.paper_tables import paper_table, select_rows, table_ids
from lbzoo.tables.results import Record, ResultsFile
from lbzoo.tables.row_recipes import RowRecipe, recipe_of
from lbzoo.tables.running import Tally, run_rows, shape_of
from lbzoo.tables.standing import table_standing


def run(
    table: str, runs: Path, fit: Any, *selectors: str, scale: Any = "mini", **options: Any
) -> tuple[Tally, list[str]]:
    said: list[str] = []
    rows = select_rows(paper_table(table), selectors)
    return run_rows(rows, scale, runs=runs, fit=fit, say=said.append, **options), said


def test_each_row_once(tmp_path: Path, fit: FakeFit) -> None:
    tally, said = run("lamb/5", tmp_path, fit)
    assert (tally.ran, len(fit.calls)) == (7, 7)
    assert [call.stages[0].global_batch_size for call in fit.calls] == [8, 16, 32, 64, 128, 256, 512]
    assert said[0] == "[1/7] lamb/5 batch_size=512: resnet50_lamb at scale mini"
    tally, said = run("lamb/5", tmp_path, fit)
    assert (tally.ran, tally.kept, len(fit.calls)) == (0, 7, 7), "what has a result is not run again"
    assert said[0] == "[1/7] lamb/5 batch_size=512: finished already"
    assert run("lamb/5", tmp_path, fit, "3", again=True)[0].ran == 1
    assert {row.status for row in table_standing("lamb/5", tmp_path).rows} == {"mini"}


def test_a_record_says_where_and_with_what(tmp_path: Path, fit: FakeFit) -> None:
    run("lamb/5", tmp_path, fit, "2")
    started, ended = lines_of(tmp_path / "tables" / "lamb" / "5.jsonl")
    assert (started["state"], ended["state"]) == ("running", "finished")
    assert (ended["recipe"], ended["recipe_hash"]) == ("resnet50_lamb", fit.calls[0].hash)
    assert ended["metrics"] == {"val/top1": 0.5, "val/top5": 0.75}
    assert ended["machine"].startswith(f"{os.cpu_count()} x ")
    assert Path(ended["run"]).parent == tmp_path / "tables" / "lamb" / "5" / "lamb_5-02-1024"
    assert ended["commit"] is None or len(ended["commit"]) >= 40


def test_one_failed_row_does_not_stop_the_rest(tmp_path: Path, fit: FakeFit) -> None:
    def answer(recipe: Any) -> dict[str, float]:
        batch = recipe.stages[0].global_batch_size
        if batch == 16:
            raise DataError("a file is missing")
        if batch == 32:
            raise ZeroDivisionError("a defect")
        return {"val/top1": 0.5}

    fit.answer = answer
    tally, said = run("lamb/5", tmp_path, fit)
    assert (tally.ran, tally.failed) == (5, 2)
    assert any(text.endswith("failed: a file is missing") for text in said)
    rows = table_standing("lamb/5", tmp_path).rows
    assert [row.status for row in rows[:4]] == ["mini", "failed", "failed", "mini"]
    assert rows[2].remark == "mini: failed: ZeroDivisionError: a defect"
    fit.answer = lambda recipe: {"val/top1": 0.5}
    tally, _ = run("lamb/5", tmp_path, fit)
    assert (tally.ran, tally.kept) == (2, 5), "failed rows are tried again"


def test_a_diverged_row_has_a_result(tmp_path: Path, fit: FakeFit) -> None:
    class Diverged(LbzooError):
        exit_code = 3

    def answer(recipe: Any) -> dict[str, float]:
        raise Diverged("the loss is NaN")

    fit.answer = answer
    run("lamb/5", tmp_path, fit, "1")
    row = table_standing("lamb/5", tmp_path).rows[0]
    assert (row.status, row.measured["top1"].value) == ("mini", None)
    assert row.remark == "mini: diverged: the loss is NaN"


def test_interrupted_stops_and_goes_on_where_it_was(tmp_path: Path, fit: FakeFit) -> None:
    fit.state = "interrupted"
    tally, _ = run("lamb/5", tmp_path, fit)
    assert tally.interrupted
    assert len(fit.calls) == 1, "the rows after it are not started"
    row = table_standing("lamb/5", tmp_path).rows[0]
    assert (row.status, row.remark, row.measured) == ("interrupted", "mini: interrupted at step 7", {})
    cut = tmp_path / "tables" / "lamb" / "5" / "lamb_5-01-512" / "1"
    (cut / "checkpoints" / "step_00000007").mkdir(parents=True)
    (cut / "checkpoints" / "step_00000007" / "state.json").write_text("{}")
    fit.state = "finished"
    assert run("lamb/5", tmp_path, fit, "1")[0].ran == 1
    assert fit.resumed == [None, cut]


def killed_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_killed_run_is_interrupted_and_a_living_one_left_alone(tmp_path: Path, fit: FakeFit) -> None:
    run("lamb/5", tmp_path, fit, "1")
    results = ResultsFile(tmp_path, "lamb/5")
    started = dataclasses.replace(results.records()[0], pid=killed_process())
    results.append(started)
    assert table_standing("lamb/5", tmp_path).rows[0].status == "interrupted"
    results.append(dataclasses.replace(started, pid=os.getppid(), host=socket.gethostname()))
    assert table_standing("lamb/5", tmp_path).rows[0].status == "running"
    tally, said = run("lamb/5", tmp_path, fit, "1")
    assert tally.kept == 1
    assert "is running already" in said[0]


def test_a_process_number_that_is_used_again_is_not_the_run(tmp_path: Path, fit: FakeFit) -> None:
    """In containers numbers are small, and the next start may have that of the one that was killed."""
    run("lamb/5", tmp_path, fit, "1")
    results = ResultsFile(tmp_path, "lamb/5")
    started = results.records()[0]
    for again in (
        dataclasses.replace(started, pid=os.getpid()),
        dataclasses.replace(started, pid=os.getppid(), time="2020-01-01T00:00:00+00:00"),
    ):
        results.append(again)
        assert table_standing("lamb/5", tmp_path).rows[0].status == "interrupted"
        tally, _ = run("lamb/5", tmp_path, fit, "1")
        assert tally.ran == 1


def test_overrides_may_not_change_what_is_trained(tmp_path: Path, fit: FakeFit) -> None:
    tally, said = run("lamb/5", tmp_path, fit, "1", overrides=["optimizer.lr=1"])
    assert (tally.failed, fit.calls) == (1, [])
    assert "changes what is trained" in said[0]
    assert "lbzoo fit lamb/5 --row 1 optimizer.lr=1" in said[0]
    assert run("lamb/5", tmp_path, fit, "2", overrides=["trainer.devices=2", "logging.every=3"])[0].ran == 1


def test_a_launcher_s_processes_are_refused(tmp_path: Path, fit: FakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="each would run the table"):
        run("lamb/5", tmp_path, fit, "1")


def test_repeats_are_seeds_and_the_mean_is_shown(tmp_path: Path, fit: FakeFit) -> None:
    fit.answer = lambda recipe: {"val/top1": {42: 0.5, 43: 0.6, 44: 0.7}[recipe.seed]}
    run("lamb/5", tmp_path, fit, "1", repeats=3)
    measured = table_standing("lamb/5", tmp_path).rows[0].measured["top1"]
    assert (measured.n, measured.value, measured.spread) == (3, pytest.approx(0.6), pytest.approx(0.1))


def test_rows_that_cannot_be_run_are_passed_over(tmp_path: Path, fit: FakeFit) -> None:
    tally, said = run("novograd/2", tmp_path, fit, "5-8")
    assert (tally.ran, tally.unavailable) == (2, 2)
    assert "not in the zoo" in said[0]


def test_smoke_runs_each_kind_of_recipe_once(tmp_path: Path, fit: FakeFit) -> None:
    tally, said = run("vrgd/2", tmp_path, fit, scale="smoke")
    assert (tally.ran, tally.checked, tally.unavailable) == (4, 17, 4)
    assert {call.stages[0].optimizer.name for call in fit.calls} == {"momentum", "lamb", "lars", "vr_lars"}
    assert all(call.trainer.devices == 1 and call.stages[0].steps == 2 for call in fit.calls)
    assert any(
        "in order; differs from vrgd/2 optimizer=momentum,batch_size=2048 in numbers alone" in text for text in said
    )
    rows = table_standing("vrgd/2", tmp_path).rows
    assert {row.status for row in rows} == {"smoke", "not in the zoo"}
    assert all(not row.measured for row in rows), "two steps are no result"
    assert run("vrgd/2", tmp_path, fit, scale="smoke")[0].kept == 21


def test_what_makes_a_shape() -> None:
    lamb = [recipe_of(row) for row in paper_table("lamb/5").rows]
    assert all(isinstance(each, RowRecipe) for each in lamb)
    shapes = {shape_of(each.load("smoke")) for each in lamb if isinstance(each, RowRecipe)}
    assert len(shapes) == 1
    first = lamb[0]
    assert isinstance(first, RowRecipe)
    for override in ("optimizer.bias_correction=false", "optimizer.name=nlamb", "callbacks=[gsnr]", "schedule=cosine"):
        assert shape_of(first.load("smoke", [override])) not in shapes, override


@pytest.mark.slow
def test_all_tables_at_scale_smoke(tmp_path: Path) -> None:
    """What `make smoke-tables` does."""
    rows = [row for each in table_ids() for row in paper_table(each).rows]
    said: list[str] = []
    tally = run_rows(rows, "smoke", runs=tmp_path, say=said.append)
    assert tally.failed == 0, [text for text in said if "failed" in text]
    assert tally.ran + tally.checked + tally.unavailable == len(rows)


def test_a_real_row_at_scale_smoke(tmp_path: Path) -> None:
    """Two optimizer steps of the real engine, in this process."""
    tally, said = run("lamb/5", tmp_path, None, "1-2", scale="smoke")
    assert (tally.ran, tally.checked, tally.failed) == (1, 1, 0), said
    records = [json.loads(line) for line in (tmp_path / "tables" / "lamb" / "5.jsonl").read_text().splitlines()]
    (ended,) = [record for record in records if record["run"]]
    assert Record(**ended).step == 2
    assert (Path(ended["run"]) / "metrics.jsonl").is_file()
