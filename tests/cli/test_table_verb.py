"""``lbzoo table``, and tables where other verbs take a recipe."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lbzoo.cli import main
from lbzoo.tables.presenting import CSV_COLUMNS


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lbzoo(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as left:
        main(words)
    captured = capsys.readouterr()
    assert left.value.code == code, captured.err
    return captured.out, captured.err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = lbzoo(capsys, "table")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert len([name for name in lines if name.rpartition("/")[2].isdigit()]) == 39
    assert " unmeasured " in lines["lamb/5"]
    assert " resnet50_lamb " in lines["lamb/5"]
    assert "21 unmeasured, 4 not in the zoo" in lines["vrgd/2"]
    assert " computed " in lines["lans/fig1"]


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(lbzoo(capsys, "table", "--json")[0])
    assert len(data["tables"]) == 39
    assert sum(len(table["rows"]) for table in data["tables"]) == 550
    assert all({"id", "rows", "recipe", "status"} <= table.keys() for table in data["tables"])
    (lamb3,) = (table for table in data["tables"] if table["id"] == "lamb/3")
    assert (lamb3["recipe"], lamb3["status"]) == ("resnet50_adamw", "unmeasured")
    cited = lamb3["rows"][6]
    assert (cited["key"]["optimizer"], cited["cited"], cited["paper"]) == ("momentum", True, {"top1": 0.752})
    assert cited["measured"] == {}
    assert {figure["id"] for figure in data["figures"]} >= {"lans/fig1", "vrgd/linreg"}


def test_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = lbzoo(capsys, "table", "lamb/5")
    assert "#  batch_size  lr          warmup_epochs  paper top1  paper top5  status" in out
    assert "7  32768       0.04        20             0.7642      0.9308      unmeasured" in out
    assert "batch 32768: learning rate  0.04        0.04        agrees" in out


def test_rows_globs_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = lbzoo(capsys, "table", "lamb/5", "--rows", "batch_size=512", "--rows", "3")
    assert [line.split()[0] for line in out.splitlines() if line[:1].isdigit()] == ["1", "3"]
    out, _ = lbzoo(capsys, "table", "lans/*")
    assert [line for line in out.splitlines() if line.startswith("lans/")] != []
    assert "area lost by the lower peak  5.28   5.2785    agrees" in out


def test_csv_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(lbzoo(capsys, "table", "--csv")[0])))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert {row["table"] for row in rows} >= {"lamb/3", "vrgd/5", "lans/1"}
    assert {row["measured"] for row in rows} == {""}
    out, _ = lbzoo(capsys, "table", "lamb/5", "--markdown")
    assert out.startswith("### lamb/5: Untuned LAMB for ImageNet")
    assert "| 7 | 32768 | 0.04 | 20 | 0.7642 | 0.9308 | unmeasured |" in out


def test_run_and_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lbzoo.tables import running

    def failing(*words: Any, **options: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(running, "_engine_fit", lambda: failing)
    out, _ = lbzoo(capsys, "table", "lamb/5", "--run", "--rows", "1-2", "--scale", "mini", code=1)
    assert "[1/2] lamb/5 batch_size=512: failed: ValueError: no such thing" in out
    assert "\n2 failed\n" in out
    out, err = lbzoo(capsys, "table", "lamb/5", "--run", "--rows", "1", "--scale", "mini", "--json", code=1)
    assert json.loads(out)["tables"][0]["rows"][0]["status"] == "failed", "what is said goes to stderr"
    assert "failed" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table", "lamb/33"], "no table or figure named 'lamb/33'; did you mean 'lamb/3'?"),
        (["table", "lamb/5", "--rows", "batch=1"], "did you mean 'batch_size'?"),
        (["table", "lamb/5", "lamb/3", "--rows", "1"], "--rows picks rows of one table"),
        (["table", "lamb/5", "--json", "--csv"], "print one of --json, --csv and --markdown"),
        (["table", "lamb/5", "trainer.devices=2"], "trainer.devices=2 is for running rows: add --run"),
        (["fit", "lamb/5"], "7 rows; say which with --row"),
        (["fit", "lamb/33", "--row", "1"], "no table named 'lamb/33'; did you mean 'lamb/3'?"),
        (["fit", "novograd/2", "--row", "5"], "is not in the zoo"),
        (["plan", "resnet50_lamb", "--row", "1"], "--row picks a row of a table, and 'resnet50_lamb' is none"),
        (["check", "resnet50_lamb", "--row", "1"], "--row picks a row of a table"),
        (["show", "lamb/5", "--row", "9"], "table lamb/5 has rows 1 to 7, not 9"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    _, err = lbzoo(capsys, *words, code=2)
    assert message in err


def test_plan_show_and_check_take_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = lbzoo(capsys, "plan", "lamb/5", "--row", "batch_size=32768", "--no-model")
    assert "learning rate  0.04 = 0.005 x sqrt(32,768 / 512)" in out
    assert "782 steps of warmup, 2,737 steps of polynomial" in out
    out, _ = lbzoo(capsys, "show", "lamb/5", "--row", "2")
    assert "global_batch_size: 1024" in out
    assert "# table row" in out
    out, _ = lbzoo(capsys, "check", "lamb/5", "--row", "2")
    assert out == "lamb/5 row 2 (batch_size=1024) on resnet50_lamb: in order at scale paper, mini, smoke\n"
    assert len(lbzoo(capsys, "check", "lamb/5")[0].splitlines()) == 7


def test_precedence_ends_with_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """base < recipe < table row < scale block < command line."""
    words = ["plan", "lamb/3", "--row", "optimizer=adam,lr_scheme=none", "--no-model", "--json"]

    def planned(*more: str) -> dict[str, Any]:
        stage: dict[str, Any] = json.loads(lbzoo(capsys, *words, *more)[0])["stages"][0]
        return stage

    assert (planned()["lr"], planned()["global_batch_size"]) == (0.001, 16384)
    assert planned("--scale", "mini")["global_batch_size"] == 128
    assert planned("--scale", "mini", "data.global_batch_size=64")["global_batch_size"] == 64
    assert planned("optimizer.lr=0.5")["lr"] == 0.5


def test_fit_takes_a_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, _ = lbzoo(capsys, "fit", "lamb/5", "--row", "batch_size=1024", "--scale", "smoke", "trainer.accelerator=cpu")
    assert "finished at step 2" in out
    assert (tmp_path / "runs" / "lamb_5-02-1024" / "1" / "recipe.yaml").is_file()
