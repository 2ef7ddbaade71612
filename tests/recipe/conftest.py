"""A working folder of their own for the tests of recipes, and a recipe to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# Every test that asserts a line number counts in this text.
VALID = """\
# lbzoo fit valid.yaml      for the tests
version: 1
task: {name: image_classification, model: resnetv2_50}
data: {name: digits, global_batch_size: 256, micro_batch_size: 32}
optimizer:
  name: novograd
  lr: 1e-2
  betas: [0.95, 0.98]
schedule: {name: cosine, warmup_epochs: 0.5}
epochs: 3
trainer: {precision: bf16-mixed}
callbacks: [trust_ratio]
mini:
  epochs: 1
"""

Write = Callable[..., Path]


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
