"""docs/gsnr.md: its example runs, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lbzoo
from lbzoo.callbacks import gsnr, noise_scale

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "gsnr.md").read_text(encoding="utf-8")


def test_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/gsnr.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("8 ") for line in lines)


def test_the_tags_are_those_of_the_callbacks() -> None:
    said = set(re.findall(r"summary/(\w+)", f"{gsnr.__doc__} {noise_scale.__doc__}"))
    assert said
    assert said - {"gsnr_"} <= set(re.findall(r"\b(\w+)\b", PAGE))


def test_the_options_and_their_defaults() -> None:
    defaults = lbzoo.get_optimizer_info("vr_lamb").defaults
    table = dict(re.findall(r"^\| `(\w+)` = ([^|]+?) \|", PAGE, re.MULTILINE))
    assert set(table) == {"gamma", "beta3", "gsnr_cap", "second_moment"}
    for name, written in table.items():
        assert str(defaults[name]) == written.strip('"')
