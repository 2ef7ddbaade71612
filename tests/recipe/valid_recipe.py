"""A recipe for tests to change, and what writes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
