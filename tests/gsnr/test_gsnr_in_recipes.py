"""Recipes with VR optimizers: they run, resume exactly, are planned, and k is the batch's and not the machine's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lbzoo.checkpoint import CheckpointFolder
from lbzoo.checkpoint.format import load_weights
from lbzoo.engines import fit
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.errors import UsageError
from lbzoo.recipe import build_task, load_recipe
from lbzoo.recipe.planning import plan_stage

# No BatchNorm: its statistics, and with them the gradients, would be those of a micro-batch.
RECIPE = """\
# A small network on digits.
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25}}
data: {name: digits, global_batch_size: 64, micro_batch_size: 8, image_size: 8}
optimizer: {name: vr_lamb, lr: 0.02}
schedule: {name: cosine}
steps: 4
trainer: {accelerator: cpu, devices: 1, gradient_clip_norm: 0.5}
checkpoint: {every_steps: 2, keep_last: 10}
logging: {every: 1}
callbacks: [gsnr]
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "vr.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = fit(recipe, runs=tmp_path_factory.mktemp("runs"))
    assert result.state == "finished"
    return result.run_dir


def weights(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    load_weights(CheckpointFolder(run / "checkpoints").step_path(step), module)
    return dict(module.named_parameters())


def test_the_run_says_what_it_measured(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {line["summary/gsnr_gradients"] for line in lines} == {8}
    assert {line["summary/gsnr_samples"] for line in lines} == {8}


def test_resume_is_the_uninterrupted_run(recipe: Path, run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "vr" / "1"
    shutil.copytree(run, cut, symlinks=True)
    checkpoints = CheckpointFolder(cut / "checkpoints")
    shutil.rmtree(checkpoints.step_path(4))
    resumed = fit(recipe, runs=tmp_path, resume=checkpoints.step_path(2))
    assert (resumed.state, resumed.step) == ("finished", 4)
    straight = weights(run)
    assert all(torch.equal(value, straight[name]) for name, value in weights(resumed.run_dir).items())


@pytest.mark.dist
def test_two_processes_train_the_same_weights(recipe: Path, run: Path, tmp_path: Path) -> None:
    two = fit(recipe, ["trainer.devices=2"], runs=tmp_path)
    straight = weights(run)
    for name, value in weights(two.run_dir).items():
        torch.testing.assert_close(value, straight[name], rtol=0, atol=2e-5, msg=name)
    assert read_metrics(two.run_dir / "metrics.jsonl")[0]["summary/gsnr_gradients"] == 8


def test_without_the_callback_nothing_else_is_different(recipe: Path, run: Path, tmp_path: Path) -> None:
    bare = fit(recipe, ["callbacks=[]"], runs=tmp_path)
    straight = weights(run)
    assert all(torch.equal(value, straight[name]) for name, value in weights(bare.run_dir).items())


def test_one_micro_batch_a_step_is_refused_in_words(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"seen 1 gradient in this step.*smaller micro_batch_size"):
        fit(recipe, ["data.micro_batch_size=64"], runs=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "state", "statistics"),
    [
        ([], 3, 1),
        (["optimizer.name=vr_momentum"], 1, 1),
        (["optimizer.name=lamb"], 2, 1),
        (["optimizer.name=lamb", "callbacks=[]"], 2, 0),
        (["callbacks=[{name: gsnr, groups: 4}]"], 3, 2),
        (["callbacks=[{name: gsnr, groups: 8}]"], 3, 1),
    ],
)
def test_the_plan_counts_the_squares(recipe: Path, overrides: list[str], state: int, statistics: int) -> None:
    """In floats a parameter: the ratios' average is state of the optimizer, the squares and pooled sums are not."""
    resolved = load_recipe(recipe, overrides)
    model = plan_stage(resolved, resolved.stages[0]).model
    assert model is not None
    assert model.statistics_bytes == statistics * model.weight_bytes
    assert model.optimizer_bytes == pytest.approx(state * model.weight_bytes, rel=0.01)
