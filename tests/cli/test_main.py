"""The command itself: exit codes, no traceback for a user's mistake, every verb's help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lbzoo
from lbzoo.cli import main
from lbzoo.errors import DataError

VERBS = ["fit", "validate", "ls", "show", "cp", "check", "plan", "schema", "doctor", "optim"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(words)
    out = capsys.readouterr()
    assert isinstance(leave.value.code, int)
    return leave.value.code, out.out, out.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"lbzoo {verb}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"lbzoo {lbzoo.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fi"], "Did you mean 'fit'"),
        (["fit"], "Missing argument"),
        (["fit", "resnet50_novograd_33k"], "did you mean 'resnet50_novograd_32k'"),
        (["fit", "resnet50_novograd_32k", "optimizer.weigth_decay=1"], "did you mean 'weight_decay'"),
        (["fit", "resnet50_novograd_32k", "--scale", "tiny"], "tiny"),
        (["fit", "resnet50_novograd_32k", "--scale", "mini", "trainer.devices=5"], "global_batch_size"),
        (["fit", "resnet50_novograd_32k", "--resume", "auto", "--init-from", "x"], "--init-from"),
    ],
)
def test_a_mistake_in_words_or_recipe_is_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing is written for a run that cannot start"


def test_data_that_is_missing_is_1_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LBZOO_IMAGENET", raising=False)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "fit", "resnet50_novograd_32k")
    assert code == 1
    for word in ("data.root", "LBZOO_IMAGENET", "train/", "val/", "--scale mini"):
        assert word in err


def test_a_checkpoint_that_is_none_is_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "validate", str(tmp_path))
    assert code == 1
    assert "holds no checkpoint" in err


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBZOO_IMAGENET", raising=False)
    with pytest.raises(DataError):
        main(["fit", "resnet50_novograd_32k", "--runs", str(tmp_path), "--debug"])


def test_a_defect_of_lbzoo_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import lbzoo.engines.run

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(lbzoo.engines.run, "_world", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit", "resnet50_novograd_32k", "--scale", "mini"])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == (1 if report["problems"] else 0)
    assert report["versions"]["torch"]
    assert set(report["extras"]) == {"vision", "text", "audio", "dlrm", "accelerate", "sweep"}


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m lbzoo ls optimizers | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ)
    assert done.stdout.startswith("name")
    assert done.stderr == ""
