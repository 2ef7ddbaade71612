"""``lbzoo schema``."""

from __future__ import annotations

import json

import pytest

from lbzoo.cli.schema import schema


def test_is_json_for_an_editor(capsys: pytest.CaptureFixture[str]) -> None:
    schema()
    data = json.loads(capsys.readouterr().out)
    assert data["$schema"].startswith("https://json-schema.org/")
    assert data["required"] == ["version"]
    assert data["additionalProperties"] is False
