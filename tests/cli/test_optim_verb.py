"""``lbzoo optim list`` and ``show``."""

from __future__ import annotations

import json

import pytest

from lbzoo.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as leave:
        main(["optim", *words])
    captured = capsys.readouterr()
    return leave.value.code, captured.out, captured.err


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", "novograd")
    assert code == 0
    assert "arXiv 1905.11286" in out
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith(("lr ", "weight_decay "))}
    assert rows == {"lr": "0.01", "weight_decay": "0.0"}


def test_show_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", "lamb", "--json")
    data = json.loads(out)
    assert data["name"] == "lamb"
    assert data["options"]["lr"] == "float"
    assert data["defaults"]["betas"] == [0.9, 0.999]


def test_show_of_a_foreign_class(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", "torch:AdamW")
    assert code == 0
    assert "weight_decay" in out


def test_show_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "show", "novogard")
    assert code == 2
    assert err == "error: no optimizer named 'novogard'; did you mean 'novograd'?\n"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "list", "novograd")
    assert [line.split()[0] for line in out.splitlines()] == ["name", "novograd"]
