"""``lbzoo check``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lbzoo.cli.check import check
from lbzoo.recipe.finding import PACKAGE_RECIPES

HEADLINE = PACKAGE_RECIPES / "resnet50_novograd_32k.yaml"
TEXT = HEADLINE.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(["resnet50_novograd_32k"], json=False, plugins=True) == 0
    captured = capsys.readouterr()
    assert captured.out == "resnet50_novograd_32k: in order at scale paper, mini, smoke\n"
    assert captured.err == ""


def test_all_recipes_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(None, json=True, plugins=True) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(list(PACKAGE_RECIPES.glob("*.yaml")))


def test_mistakes_of_all_scales_and_files_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT.replace("name: novograd", "name: novogard").replace("name: digits", "name: digts")
    text = text.replace("id: novograd/3", "id: novograd/8")
    Path("broken.yaml").write_text(text, encoding="utf-8")
    assert check(["broken.yaml", "resnet50_novograd_8k", "nothing.yaml"], json=False, plugins=True) == 2
    captured = capsys.readouterr()
    assert captured.out == "resnet50_novograd_8k: in order at scale paper, mini, smoke\n"
    assert captured.err.splitlines() == [
        f"error: broken.yaml:{line_of(text, 'novogard')}: optimizer.name: no optimizer named 'novogard'; "
        "did you mean 'novograd'?",
        f"error: broken.yaml:{line_of(text, 'digts')}: mini.data.name: no data named 'digts'; did you mean 'digits'?",
        "broken.yaml: 2 mistakes",
        "error: no recipe file 'nothing.yaml'; `lbzoo ls` lists the recipes",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id: novograd/3", "id: novograd/8", "table: no table named 'novograd/8'"),
        ("id: novograd/3", "id: nvograd/3", "table: no paper named 'nvograd'; did you mean 'novograd'?"),
        ("row: {batch_size: 32768}", "row: {batch: 32768}", "table: table novograd/3 has no column 'batch'"),
        ("row: {batch_size: 32768}", "row: {batch_size: 3}", "table: 0 rows of table novograd/3 hold"),
        ("row: {batch_size: 32768}", "row: {epochs: 90}", "table: 3 rows of table novograd/3 hold"),
    ],
)
def test_the_row_of_the_table_must_exist(capsys: pytest.CaptureFixture[str], old: str, new: str, message: str) -> None:
    text = TEXT.replace(old, new)
    Path("broken.yaml").write_text(text, encoding="utf-8")
    assert check(["broken.yaml"], json=False, plugins=True) == 2
    assert capsys.readouterr().err.startswith(f"error: broken.yaml:{line_of(text, 'table:')}: {message}")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_text("version: 1\n", encoding="utf-8")
    assert check(["broken.yaml"], json=True, plugins=True) == 2
    (report,) = json.loads(capsys.readouterr().out)
    assert report["recipe"] == "broken.yaml"
    assert report["scales"] == ["paper"]
    assert "broken.yaml:1: task: required, but missing" in report["problems"]


def test_imports_nothing_heavy() -> None:
    program = """
import sys
from lbzoo.cli import main
try:
    main(["check"])
except SystemExit as leave:
    assert leave.code == 0
print([name for name in ("torch", "lightning", "timm", "torchvision", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
