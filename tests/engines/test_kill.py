"""kill -9 at any moment: nothing is lost, nothing is done twice. ``make test-kill`` kills one run 20 times."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_jobs import fit_here, saved_weights
from kill_jobs import run_until_killed
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lbzoo.engines.metrics_file import read_metrics

KILLS = int(os.environ.get("LBZOO_KILLS", "3"))
STEPS = 6 * (KILLS + 1)
RECIPE = f"""\
version: 1
seed: 3
task: {{name: image_classification, model: resnetv2_50, model_args: {{layers: [1, 1, 1, 1], width_factor: 0.25,
       norm_layer: batchnorm2d, drop_rate: 0.1}}}}
data: {{name: digits, global_batch_size: 64, micro_batch_size: 16, image_size: 16}}
optimizer: {{name: vr_lamb, lr: 0.01}}
schedule: {{name: cosine, warmup_steps: 2}}
trainer: {{accelerator: cpu, devices: 1, validate_every: {{steps: 5}}, ema: {{decay: 0.9}}}}
checkpoint: {{every_steps: 2, keep_last: 2}}
logging: {{every: 1}}
callbacks: [{{name: noise_scale, observe_every: 1}}, trust_ratio, {{name: train_metrics, every: 3}}]
stages:
  - {{name: first, steps: {STEPS // 2}}}
  - {{name: second, steps: {STEPS - STEPS // 2}, data: {{global_batch_size: 128}}, optimizer: {{reset: false}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "killed.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.filterwarnings("ignore:k = ")
@pytest.mark.parametrize(
    ("engine", "how"),
    [
        ("lightning", "in background"),
        ("accelerate", "at once"),
        pytest.param("lightning", "at once", marks=pytest.mark.slow),
        pytest.param("accelerate", "in background", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_the_uninterrupted_run(recipe: Path, tmp_path: Path, engine: str, how: str) -> None:
    """Bit for bit: weights, metrics, and the events of TensorBoard, in their files, with the moving averages."""
    overrides = [f"trainer.engine={engine}", f"checkpoint.asynchronous={str(how == 'in background').lower()}"]
    whole = fit_here(recipe, overrides, tmp_path / "whole").run_dir
    draw = random.Random(f"{engine} {how} {KILLS}")
    steps = sorted(draw.sample(range(5, STEPS - 3), KILLS))
    assert run_until_killed(recipe, overrides, tmp_path / "cut", steps) == KILLS
    cut = tmp_path / "cut" / "killed" / "1"
    expected, actual = saved_weights(whole), saved_weights(cut)
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert without_times(read_metrics(cut / "metrics.jsonl")) == without_times(read_metrics(whole / "metrics.jsonl"))
    events = events_of(cut)
    assert events == events_of(whole)
    assert set(events.values()) == {1}, "nothing stands twice in the files"
    assert {step for tag, step, _ in events if tag == "summary/noise_scale"} == set(range(1, STEPS + 1))
    assert not list((cut / "checkpoints").glob("*.tmp"))


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time", "summary/samples_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def events_of(run: Path) -> Counter[tuple[str, int, float | bytes]]:
    """How often each (tag, step, value) stands in the event files, scalars and images, as they are on the disk."""
    found: Counter[tuple[str, int, float | bytes]] = Counter()
    for file in (run / "tensorboard").glob("events.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith(("train/", "summary/", "val/", "trust_ratio/", "heatmap/", "hist/")):
                    scalars = value.tensor.float_val
                    content: float | bytes = scalars[0] if scalars else value.tensor.SerializeToString()
                    if value.tag != "summary/samples_per_second":
                        found[value.tag, event.step, content] += 1
    return found
