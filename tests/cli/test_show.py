"""``lbzoo show``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lbzoo.cli.fit import ScaleName
from lbzoo.cli.show import show

HEADLINE = "resnet50_novograd_32k"


def shown(capsys: pytest.CaptureFixture[str], *overrides: str, **options: object) -> tuple[str, str]:
    settings = {"scale": ScaleName.paper, "groups": False, "json": False, "plugins": True, **options}
    show(HEADLINE, list(overrides), **settings)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_every_line_is_yaml_and_has_an_origin(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown(capsys, "optimizer.lr=0.5")
    assert err == ""
    data = yaml.safe_load(out)
    assert data["optimizer"]["lr"] == 0.5
    assert data["steps"] == 3519
    for line in out.splitlines()[1:]:
        assert line.endswith(":") or " # " in line
    (rate,) = [line for line in out.splitlines() if line.startswith("  lr:")]
    assert rate.endswith("# override")


def test_mini_and_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown(capsys, "optimizer.name=sgd", scale=ScaleName.mini)
    assert yaml.safe_load(out)["data"]["name"] == "digits"
    assert err == "note: optimizer 'sgd' takes no betas: left out (written for 'novograd')\n"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = shown(capsys, "optimizer.lr=0.5", json=True)
    data = json.loads(out)
    (stage,) = data["stages"]
    assert stage["optimizer"]["lr"] == 0.5
    assert stage["origins"]["optimizer.lr"] == "override"
    assert stage["origins"]["task.num_classes"] == "from imagenet"
    assert stage["steps"] == 3519
    assert data["hash"]
    assert data["trainer"]["precision"] == "bf16-mixed"


def test_parameter_groups(capsys: pytest.CaptureFixture[str]) -> None:
    rules = "optimizer.param_rules=[{ndim: 1, weight_decay: 0.0}]"
    out, _ = shown(capsys, rules, groups=True, scale=ScaleName.mini)
    groups = [line for line in out.splitlines() if line.startswith("# group")]
    assert len(groups) == 2
    assert "#     model.stem.conv.weight" in out
    assert yaml.safe_load(out)["optimizer"]["name"] == "novograd", "groups are comments"


def test_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = shown(capsys)
    version = out.splitlines()[1]
    assert re.fullmatch(r"version: 1 +# line \d+", version), "lines of the recipe itself carry no file name"
