"""Stages on one run: steps go on, weights are carried, and a run that is stopped in the second resumes there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lbzoo.checkpoint import CheckpointFolder
from lbzoo.checkpoint.format import load_weights
from lbzoo.engines import fit
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.engines.run_callbacks import MicroBatchSeeds
from lbzoo.errors import CheckpointError
from lbzoo.recipe import build_task, load_recipe
from lbzoo.tasks.image_classification import ImageClassification

RECIPE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25}}
data: {name: digits, global_batch_size: 64, micro_batch_size: 16, image_size: 16}
optimizer: {name: novograd, lr: 0.01, weight_decay: 0.001}
schedule: cosine
trainer: {accelerator: cpu, devices: 1, validate_every: {steps: 3}}
checkpoint: {keep_last: 10}
logging: {every: 1}
stages:
  - {name: small, steps: 4}
  - {name: large, steps: 5, data: {global_batch_size: 128}, optimizer: {name: lamb, lr: 0.02},
     schedule: {name: polynomial, warmup_steps: 2}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "stages.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(recipe, runs=tmp_path_factory.mktemp("runs")).run_dir


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    load_weights(CheckpointFolder(run / "checkpoints").step_path(step), module)
    return module.state_dict()


def test_steps_and_samples_run_through(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["stage"] for line in lines] == ["small"] * 4 + ["large"] * 5
    assert [line["samples"] for line in lines] == [64, 128, 192, 256, 384, 512, 640, 768, 896]
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 4, 6, 9]
    rates = [line["summary/lr"] for line in lines[4:]]
    assert rates == pytest.approx([0.01, 0.02, 0.02 * 2 / 3, 0.02 / 3, 0.0])  # warmup anew, then linear


def test_the_second_stage_starts_from_the_first_one_s_weights(recipe: Path, tmp_path: Path, run: Path) -> None:
    """With a learning rate of 0 it ends with them."""
    still = fit(recipe, ["stages.large.optimizer.lr=0"], runs=tmp_path).run_dir
    first, second = weights(run, 4), weights(still, 9)
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    for name, _ in module.named_parameters():
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("step", [4, 6])
def test_stopped_at_the_border_or_in_the_second_stage(
    recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = MicroBatchSeeds.on_train_batch_start

    def stop_in_step(callback: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        original(callback, trainer, module, batch, batch_idx)
        if trainer.global_step == step - 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MicroBatchSeeds, "on_train_batch_start", stop_in_step)
        assert fit(recipe, runs=tmp_path).step == step
    result = fit(recipe, runs=tmp_path, resume="auto")
    assert (result.state, result.step) == ("finished", 9)
    expected, actual = weights(run, 9), weights(result.run_dir, 9)
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 4, 6, 9]
    assert json.loads((result.run_dir / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_stopped_while_a_stage_ends(
    recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """In its last validation, after its last step: the next stage stops after its first."""
    original = ImageClassification.on_validation_epoch_end

    def stop_at_the_end(module: Any) -> None:
        original(module)
        if module.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    words = [f"trainer.engine={engine}"]
    with monkeypatch.context() as patch:
        patch.setattr(ImageClassification, "on_validation_epoch_end", stop_at_the_end)
        stopped = fit(recipe, words, runs=tmp_path)
    assert (stopped.state, stopped.step, stopped.exit_code) == ("interrupted", 5, 143)
    result = fit(recipe, words, runs=tmp_path, resume="auto")
    assert (result.state, result.step) == ("finished", 9)
    expected, actual = weights(run, 9), weights(result.run_dir, 9)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_a_stage_that_a_callback_ends(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The next one begins with its optimizer's state; a run that is killed there does not go back into it."""
    original = MicroBatchSeeds.on_train_batch_start

    def hook(callback: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        original(callback, trainer, module, batch, batch_idx)
        if trainer.global_step == 4:
            raise KeyboardInterrupt
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        trainer.should_stop = is_last and trainer.global_step == 1

    words = [f"trainer.engine={engine}", "stages.large.optimizer={name: novograd, reset: false}"]
    with monkeypatch.context() as patch:
        patch.setattr(MicroBatchSeeds, "on_train_batch_start", hook)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(recipe, words, runs=tmp_path)
    result = fit(recipe, words, runs=tmp_path, resume="auto")
    assert [line["step"] for line in read_metrics(result.run_dir / "metrics.jsonl")] == [1, 2, 5, 6, 7, 8, 9]


def test_stages_that_share_nothing(recipe: Path, tmp_path: Path) -> None:
    overrides = ["stages.large.task.model=resnet10t", "stages.large.task.model_args=null"]
    with pytest.raises(CheckpointError, match="share no parameter"):
        fit(recipe, overrides, runs=tmp_path)
