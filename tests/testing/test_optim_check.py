"""``lbzoo optim check``: rows, reasons, JSON, exit codes."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from lbzoo.cli.optim_check import check, parse_options
from lbzoo.errors import UsageError

app = typer.Typer()
app.command()(check)


def run(*words: str) -> tuple[int, str]:
    """(exit code, output); the command returns its exit code, as all verbs do."""
    result = CliRunner().invoke(app, words, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def test_a_row_a_check_and_success():
    code, output = run("adamw", "--only", "closure", "--only", "layer_stats_shape")
    assert code == 0
    assert output.splitlines()[0] == "ok      closure"
    assert output.splitlines()[1].split(maxsplit=2) == ["-", "layer_stats_shape", "publishes no layer statistics"]
    assert "adamw: 1 passed, 1 skipped" in output


def test_failure_says_what_and_why():
    code, output = run("timm:lamb", "--only", "nan_*")
    assert code == 1
    assert "FAILED  nan_stays_in_its_layer" in output
    assert "changed layers.embedding0.weight" in output
    assert "must not spread" in output, "the reason that the check exists"
    assert "timm:lamb: 1 passed, 1 failed" in output


def test_options_reach_the_optimizer():
    assert run("timm:lamb", "max_grad_norm=null", "--only", "nan_*")[0] == 0


def test_json():
    code, output = run("timm:lamb", "betas=[0.8, 0.9]", "--only", "nan_*", "--json")
    report = json.loads(output)
    assert code == 1
    assert report["optimizer"] == "timm:lamb"
    assert report["options"] == {"betas": [0.8, 0.9]}
    assert [(row["name"], row["status"]) for row in report["checks"]] == [
        ("nan_stays_in_its_layer", "failed"),
        ("nan_shows", "passed"),
    ]
    assert all(row["why"] for row in report["checks"])


def test_slow_checks_run_when_asked_for():
    assert run("sgd", "--only", "torch_compile")[1].split(maxsplit=2)[:2] == ["-", "torch_compile"]
    assert run("sgd", "--only", "torch_compile", "--slow")[1].split()[:2] == ["ok", "torch_compile"]


def test_option_values():
    assert parse_options(["lr=1e-2", "betas=[0.9, 0.98]", "nesterov=both", "clip=null", "amsgrad=true", "t0=1e6"]) == {
        "lr": 0.01,
        "betas": (0.9, 0.98),
        "nesterov": "both",
        "clip": None,
        "amsgrad": True,
        "t0": 1e6,
    }


@pytest.mark.parametrize("words", [("adamw", "fused"), ("adamw", "=1"), ("nothing_like_it",), ("adamw", "--only", "x")])
def test_mistakes_of_the_caller(words):
    with pytest.raises(UsageError):
        run(*words)
