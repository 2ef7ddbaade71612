"""Whole runs with ``strategy: fsdp``: started by lbzoo, stopped by a signal, in lower precision, with averages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, fit_until_signal, saved_weights

from lbzoo.engines import fit
from lbzoo.engines.metrics_file import read_metrics

RECIPE = """\
version: 1
seed: 3
task: {name: "parity_tasks:LayerNormNet"}
data: {name: "parity_tasks:Vectors", global_batch_size: 16, micro_batch_size: 4}
optimizer: {name: lamb, lr: 0.02, weight_decay: 0.001}
schedule: {name: cosine, warmup_steps: 2}
steps: 8
trainer: {accelerator: cpu, strategy: fsdp, gradient_clip_norm: 1.0, validate_every: {steps: 4}}
checkpoint: {keep_last: 10}
logging: {every: 1, loggers: []}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "sharded.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one device, nothing sharded."""
    runs = tmp_path_factory.mktemp("runs")
    return on_ranks(1, fit_here, recipe, ["trainer.strategy=auto"], runs)[0].run_dir


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    one, other = saved_weights(expected), saved_weights(found)
    for name, value in one.items():
        torch.testing.assert_close(other[name].double(), value.double(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.dist
def test_started_by_lbzoo(recipe: Path, tmp_path: Path) -> None:
    """A network with BatchNorm and an L2 term, its activations checkpointed, on processes that lbzoo starts."""
    words = [
        "task={name: image_classification, model: cifar_resnet20, l2_regularization: 0.001}",
        "data={name: digits, image_size: 8, global_batch_size: 32, micro_batch_size: 8}",
        "trainer.precision=64-true",
    ]
    alone = on_ranks(1, fit_here, recipe, [*words, "trainer.strategy=auto"], tmp_path)[0]
    result = fit(recipe, [*words, "trainer.devices=2", "trainer.activation_checkpointing=true"], runs=tmp_path)
    assert (result.state, result.step) == ("finished", 8)
    assert_close(result.run_dir, alone.run_dir, 1e-9)
    assert [line["step"] for line in read_metrics(result.run_dir / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_one_process_is_sharded_too(recipe: Path, run: Path, tmp_path: Path, engine: str) -> None:
    """In a process group of its own, which ends with the run."""
    result = fit_here(recipe, [f"trainer.engine={engine}"], tmp_path)
    assert (result.state, result.step) == ("finished", 8)
    assert_close(result.run_dir, run, 1e-6)
    assert not torch.distributed.is_initialized()


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_stopped_by_a_signal_to_one_rank(recipe: Path, run: Path, tmp_path: Path, engine: str) -> None:
    words = [f"trainer.engine={engine}"]
    stopped = on_ranks(2, fit_until_signal, recipe, words, tmp_path, 3)
    assert stopped[0].state == "interrupted"
    assert [result.exit_code for result in stopped] == [143, 143]
    assert 3 <= stopped[0].step <= 4  # the ranks agree a step later
    result = on_ranks(4, partial(fit_here, resume="auto"), recipe, words, tmp_path)[0]
    assert (result.state, result.step, result.run_dir) == ("finished", 8, stopped[0].run_dir)
    assert_close(result.run_dir, run, 1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 1e-2), ("bf16-true", 2e-2), ("64-true", 1e-6)])
def test_precisions(recipe: Path, run: Path, tmp_path: Path, precision: str, tolerance: float, engine: str) -> None:
    words = [f"trainer.precision={precision}", f"trainer.engine={engine}"]
    result = on_ranks(2, fit_here, recipe, words, tmp_path)[0]
    assert (result.state, result.step) == ("finished", 8)
    losses = [line["train/loss"] for line in read_metrics(result.run_dir / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert_close(result.run_dir, run, tolerance)


@pytest.mark.dist
def test_averages_are_those_of_one_device(recipe: Path, tmp_path: Path) -> None:
    """Validated with, so that a root whose averages stayed gathered would train on with them."""
    words = ["trainer.ema.decay=0.9", "trainer.validate_every.steps=1"]
    alone = on_ranks(1, fit_here, recipe, [*words, "trainer.strategy=auto"], tmp_path)[0]
    sharded = on_ranks(2, fit_here, recipe, words, tmp_path)[0]
    assert_close(sharded.run_dir, alone.run_dir, 1e-6)
    assert sharded.metrics == pytest.approx(alone.metrics, abs=1e-6)
