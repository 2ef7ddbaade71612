"""A working folder of their own for the tests of recipes, and a recipe to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID, Write


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """``write(text, name)`` puts a file into the working folder and returns its path relative to it."""
    monkeypatch.chdir(tmp_path)

    def put(text: str, name: str = "valid.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return put


@pytest.fixture
def valid(write: Write) -> Path:
    return write(VALID)
