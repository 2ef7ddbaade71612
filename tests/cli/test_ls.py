"""``lbzoo ls``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lbzoo import registry
from lbzoo.cli.ls import Kind, ls

HEAVY = ("torch", "lightning", "timm", "torchvision", "sklearn")


def test_recipes_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    ls(Kind.recipes, "resnet50_novograd*", json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "summary", "from"]
    assert [line.split()[0] for line in lines[1:]] == [f"resnet50_novograd_{size}" for size in ("1k", "32k", "8k")]
    assert "NovoGrad tables 2-3: top-1 75.78" in lines[2]


@pytest.mark.parametrize("kind", ["optimizers", "tasks", "data", "callbacks", "schedules", "models"])
def test_components(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    ls(Kind(kind), json=True)
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == getattr(registry, kind).names()
    for entry in entries:
        assert entry["summary"], f"{entry['name']} has no docstring"
        assert Path(entry["source"].rpartition(":")[0]).is_file()


def test_a_wrapper_is_one_line_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    ls(Kind.optimizers, json=False)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "larc_<name>" in names
    assert "novograd" in names
    assert "larc_novograd" not in names
    ls(Kind.optimizers, "larc_*", json=False)
    assert "larc_novograd" in capsys.readouterr().out


def test_nothing_matches(capsys: pytest.CaptureFixture[str]) -> None:
    ls(Kind.optimizers, "zzz*", json=False)
    assert capsys.readouterr().out == "no optimizers match 'zzz*'\n"


def test_lines_are_not_cut_or_coloured_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    ls(Kind.schedules, json=False)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) > 80


def test_imports_nothing_heavy(tmp_path: Path) -> None:
    program = f"""
import sys
from lbzoo.cli import main
for kind in ("recipes", "optimizers", "tasks", "data", "callbacks", "schedules", "models"):
    try:
        main(["ls", kind])
    except SystemExit as leave:
        assert not leave.code
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
