"""Averages of the weights: the formula, validation with them, and what a checkpoint keeps of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import average_jobs as jobs
import pytest
import torch
from average_jobs import Layout, Network
from distributed import on_ranks
from fit_jobs import fit_here
from torch import nn

from lbzoo.checkpoint import CheckpointFolder, load_checkpoint, load_weights, read_state, save_checkpoint
from lbzoo.engines import fit, validate
from lbzoo.engines.weight_average import WeightAverage
from lbzoo.errors import CheckpointError
from lbzoo.recipe import build_task, load_recipe
from lbzoo.recipe.planning import plan_stage

RECIPE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25,
       norm_layer: batchnorm2d}}
data: {name: digits, global_batch_size: 64, micro_batch_size: 32, image_size: 16}
optimizer: {name: momentum, lr: 0.05}
steps: 8
trainer: {accelerator: cpu, devices: 1, validate_every: {steps: 4}, ema: {decay: 0.9}}
checkpoint: {every_steps: 2, keep_last: 10}
logging: {every: 1, loggers: []}
"""


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula(every: int, dtype: torch.dtype) -> None:
    """Against the definition in float64, weight by weight; 100 steps pass the end of the warmup of the decay."""
    module = nn.Linear(3, 2).to(dtype)
    average = WeightAverage(module, decay=0.8, every_steps=every)
    expected = module.weight.detach().double().clone()
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 101):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=generator))
        average.update(step)
        if step % every == 0:
            decay = min(0.8, (1 + step) / (10 + step)) ** every
            expected = decay * expected + (1 - decay) * module.weight.detach().double()
    actual = average.averages["weight"]
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


def test_the_decay_begins_low_and_ends_at_what_was_asked_for() -> None:
    average = WeightAverage(nn.Linear(1, 1), decay=0.99)
    assert average.decay_at(1) == pytest.approx(2 / 11)
    assert average.decay_at(100) == pytest.approx(101 / 110)
    assert average.decay_at(10_000) == 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype) -> None:
    """Bit for bit, in the same memory; in between the module computes with the averages."""
    module = Network().to(dtype)
    average = WeightAverage(module, decay=0.5)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight))
    average.update(1)
    trained = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    averages = {name: tensor.clone() for name, tensor in average.averages.items()}
    addresses = [weight.data_ptr() for weight in module.parameters()]
    average.exchange()
    for name, weight in module.named_parameters():
        assert torch.equal(weight, averages[name].to(dtype)), name
        assert not torch.equal(weight, trained[name]), name
    average.exchange()
    assert [weight.data_ptr() for weight in module.parameters()] == addresses
    for name, weight in module.named_parameters():
        assert torch.equal(weight, trained[name]), name
        assert torch.equal(average.averages[name], averages[name]), name


def test_what_is_averaged() -> None:
    """Running statistics as the weights that they belong to; no frozen weights, no counters."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.9)
    assert set(average.averages) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    module(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    average.update(1)
    expected = (1 - 2 / 11) * module[1].running_mean
    torch.testing.assert_close(average.averages["1.running_mean"], expected)


def test_a_checkpoint_keeps_the_averages_under_their_own_keys(tmp_path: Path) -> None:
    on_ranks(1, jobs.save, "plain", 3, tmp_path / "step_00000003")
    trained, averaged = on_ranks(1, jobs.train, "plain", 3, False)[0]
    module = Network(seed=9).double()
    load_weights(tmp_path / "step_00000003", module)
    assert all(torch.equal(weight, trained[name]) for name, weight in module.named_parameters())
    load_weights(tmp_path / "step_00000003", module, averaged=True)
    assert all(torch.equal(weight, averaged[name]) for name, weight in module.named_parameters())


def test_a_checkpoint_without_averages(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    save_checkpoint(tmp_path / "step_00000001", module, optimizer, {})
    with pytest.raises(CheckpointError, match=r"holds no averages of the weights: it was saved without trainer\.ema"):
        load_weights(tmp_path / "step_00000001", module, averaged=True)
    average = WeightAverage(module, decay=0.9)
    with pytest.raises(CheckpointError, match="holds no averages"):
        load_checkpoint(tmp_path / "step_00000001", module, optimizer, average.averages)


def assert_close(actual: jobs.Weights, expected: jobs.Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= 1e-14, name


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_validation_with_the_averages_leaves_training_as_it_was(layout: Layout) -> None:
    """Under FSDP2 a forward pass without a backward pass leaves the root's weights gathered: those were averages."""
    expected = on_ranks(1, jobs.train, "plain", 5, False)[0]
    for trained, averaged in on_ranks(2, jobs.train, layout, 5, True):
        assert_close(trained, expected[0])
        assert_close(averaged, expected[1])


@pytest.mark.dist
@pytest.mark.parametrize("saved", ["plain", "ddp", "fsdp"])
@pytest.mark.parametrize("resumed", ["plain", "fsdp"])
def test_averages_go_on_in_another_layout(tmp_path: Path, saved: Layout, resumed: Layout) -> None:
    """On one rank the plain layout, on two the others."""
    path = tmp_path / "step_00000003"
    on_ranks(1 if saved == "plain" else 2, jobs.save, saved, 3, path)
    expected = on_ranks(1, jobs.train, "plain", 6, False)[0]
    for trained, averaged in on_ranks(1 if resumed == "plain" else 2, jobs.resume, resumed, path, range(4, 7)):
        assert_close(trained, expected[0])
        assert_close(averaged, expected[1])


TOKENS = """\
version: 1
seed: 3
task: {name: "token_task:TwoMeans"}
data: {name: "token_task:UnevenTokens", global_batch_size: 8, micro_batch_size: 4}
optimizer: {name: momentum, lr: 0.5}
steps: 6
trainer: {accelerator: cpu, precision: 64-true, ema: {decay: 0.7, every_steps: 2}, validate_every: {steps: 2}}
checkpoint: {every_steps: 2, keep_last: 10}
logging: {every: 1, loggers: []}
"""
ENGINES = [("lightning", "ddp"), ("lightning", "fsdp"), ("accelerate", "ddp"), ("accelerate", "fsdp")]


@pytest.mark.dist
def test_averages_of_every_engine_and_layout_are_those_of_one_device(tmp_path: Path) -> None:
    """Validated with every other step; then each goes on from what another of them has saved at step 2."""
    path = tmp_path / "tokens.yaml"
    path.write_text(TOKENS)
    alone = fit_here(path, ["trainer.devices=1"], tmp_path / "alone").run_dir
    of_two = [["trainer.devices=2", f"trainer.engine={engine}", f"trainer.strategy={how}"] for engine, how in ENGINES]
    runs = [on_ranks(2, fit_here, path, of, tmp_path / str(n))[0].run_dir for n, of in enumerate(of_two)]
    for run in runs:
        assert_same_run(run, alone)
    resume = functools.partial(fit_here, resume="auto")
    for n, run in enumerate(runs):
        cut_after(run, 2)
        on_ranks(2, resume, path, of_two[n - 1], tmp_path / str(n))
        assert_same_run(run, alone)


def assert_same_run(run: Path, expected: Path) -> None:
    for mine, theirs in zip(both_weights(run, 6), both_weights(expected, 6), strict=True):
        assert_close(mine, theirs)


def cut_after(run: Path, step: int) -> None:
    """Make the run one that was interrupted after it had saved ``step``."""
    for path in (run / "checkpoints").iterdir():
        if path.is_symlink():
            path.unlink()
        elif int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "averaged.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(recipe, runs=tmp_path_factory.mktemp("runs")).run_dir


def both_weights(run: Path, step: int) -> list[dict[str, torch.Tensor]]:
    """(trained, averaged) of a run's checkpoint."""
    found = []
    for averaged in (False, True):
        recipe = load_recipe(run / "recipe.yaml")
        module = build_task(recipe.stages[0])
        module.to(torch.float64 if recipe.trainer.precision == "64-true" else torch.float32)
        load_weights(CheckpointFolder(run / "checkpoints").step_path(step), module, averaged=averaged)
        found.append(module.state_dict())
    return found


def test_a_run_validates_with_its_averages(run: Path) -> None:
    """`lbzoo validate` finds again what the run logged; without trainer.ema it validates the trained weights."""
    logged = json.loads((run / "status.json").read_text())["metrics"]
    again = validate(run, prefer="last")
    assert again == pytest.approx(logged, rel=1e-5)
    trained = validate(run, ["trainer.ema=null"], prefer="last")
    assert abs(trained["val/loss"] - logged["val/loss"]) > 1e-3


def test_training_is_the_same_with_and_without_averages(run: Path, recipe: Path, tmp_path: Path) -> None:
    without = fit(recipe, ["trainer.ema=null"], runs=tmp_path).run_dir
    expected, actual = (build_task(load_recipe(recipe).stages[0]) for _ in range(2))
    load_weights(CheckpointFolder(without / "checkpoints").step_path(8), expected)
    load_weights(CheckpointFolder(run / "checkpoints").step_path(8), actual)
    for (name, one), other in zip(expected.state_dict().items(), actual.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_resumed_run_has_the_averages_of_the_uninterrupted_one(run: Path, recipe: Path, tmp_path: Path) -> None:
    """Bit for bit, from the checkpoint of step 6."""
    cut = tmp_path / "averaged" / "1"
    fit(recipe, runs=tmp_path)
    cut_after(cut, 6)
    said: list[str] = []
    fit(recipe, runs=tmp_path, resume="auto", say=said.append)
    assert any("at step 6" in text for text in said)
    for expected, actual in zip(both_weights(run, 8), both_weights(cut, 8), strict=True):
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


def test_a_run_that_starts_from_it_starts_from_the_averages(run: Path, recipe: Path, tmp_path: Path) -> None:
    assert read_state(CheckpointFolder(run / "checkpoints").step_path(8))["ema"]["in_validation"]
    result = fit(recipe, ["optimizer.lr=0", "steps=1"], runs=tmp_path, init_from=run / "checkpoints" / "step_00000008")
    trained, averaged = both_weights(run, 8)
    started, _ = both_weights(result.run_dir, 1)
    assert torch.equal(started["model.stem.conv.weight"], averaged["model.stem.conv.weight"])
    assert not torch.equal(started["model.stem.conv.weight"], trained["model.stem.conv.weight"])


def test_the_hash_knows_the_averages(recipe: Path) -> None:
    hashes = {load_recipe(recipe, [f"trainer.ema={ema}"]).hash for ema in ("null", "{decay: 0.9}", "{decay: 0.99}")}
    assert len(hashes) == 3


def test_the_plan_counts_their_memory(recipe: Path) -> None:
    resolved = load_recipe(recipe)
    model = plan_stage(resolved, resolved.stages[0]).model
    assert model is not None
    assert model.average_bytes == model.weight_bytes
    without = load_recipe(recipe, ["trainer.ema=null"])
    assert plan_stage(without, without.stages[0]).model == dataclasses.replace(model, average_bytes=0)
