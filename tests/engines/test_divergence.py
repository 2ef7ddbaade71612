"""Runs that diverge: what is noticed, what is reported, and what the policies do, in both engines and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import on_ranks
from divergence_jobs import fit_with
from fit_jobs import saved_weights

from lbzoo.checkpoint import CheckpointFolder
from lbzoo.data.sampling import StreamSampler
from lbzoo.engines import divergence
from lbzoo.engines.metrics_file import read_metrics

RECIPE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25,
       norm_layer: batchnorm2d}}
data: {name: digits, global_batch_size: 64, micro_batch_size: 16, image_size: 16}
optimizer: {name: lamb, lr: 0.01}
schedule: {name: constant}
steps: 6
trainer: {accelerator: cpu, devices: 1, validate_every: {steps: 6}}
checkpoint: {every_steps: 2, keep_last: 10}
logging: {every: 1}
callbacks: [trust_ratio, noise_scale]
"""
ENGINES = ["lightning", "accelerate"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


def status(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "small" / "1" / "status.json").read_text())


def report(runs: Path, step: int) -> dict[str, Any]:
    return json.loads((runs / "small" / "1" / "divergence" / f"step_{step:08d}.json").read_text())


def a_sample_of(step: int, micro_batch: int) -> int:
    sampler = StreamSampler(num_samples=1437, global_batch_size=64, micro_batch_size=16, seed=3, steps=6)
    return sampler.micro_batch(step - 1, micro_batch)[5].index


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_sample_is_named(recipe: Path, tmp_path: Path, engine: str) -> None:
    """Exit code 3; the first bad step, its worst micro-batch with the sample in it; nothing bad is saved."""
    sample = a_sample_of(step=4, micro_batch=2)
    code, message = fit_with({"kind": "sample", "index": sample}, recipe, [f"trainer.engine={engine}"], tmp_path)
    assert code == 3
    assert "diverged at step 4: the loss is not finite" in message
    assert "rank 0, micro-batch 2: samples " in message
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("diverged", 3)
    found = report(tmp_path, 4)
    assert found["loss"] == "nan"
    (worst,) = found["worst_micro_batches"]
    assert (worst["rank"], worst["micro_batch"]) == (0, 2)
    assert sample in worst["samples"]
    assert sum(len(ids) for rank in found["samples"] for ids in rank) == 64
    assert all({"name", "grad_norm", "param_norm", "trust_ratio"} == layer.keys() for layer in found["layers"])
    assert any(isinstance(layer["trust_ratio"], float) for layer in found["layers"])
    assert CheckpointFolder(tmp_path / "small" / "1" / "checkpoints").steps() == [2]
    assert [line["step"] for line in read_metrics(tmp_path / "small" / "1" / "metrics.jsonl")][:3] == [1, 2, 3]


def test_a_bad_layer_is_named(recipe: Path, tmp_path: Path) -> None:
    fault = {"kind": "layer", "name": "model.head.fc.weight", "steps": [3]}
    code, message = fit_with(fault, recipe, [], tmp_path)
    assert code == 3
    assert "diverged at step 3: gradients are not finite" in message
    found = report(tmp_path, 3)
    assert found["layers"][0]["name"] == "head.fc.weight"
    assert found["layers"][0]["grad_norm"] == "nan"
    assert all(isinstance(layer["grad_norm"], float) for layer in found["layers"][1:])


@pytest.mark.dist
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["layer", "sample", "loss"])
def test_one_rank_of_two(recipe: Path, tmp_path: Path, engine: str, fault: str) -> None:
    """Only rank 1 sees it; both end at the same step, and the report says which it was."""
    faults: dict[str, dict[str, Any]] = {
        "layer": {"kind": "layer", "name": "model.head.fc.weight", "steps": [3], "rank": 1},
        "sample": {"kind": "sample", "index": a_sample_of(step=3, micro_batch=3)},
        "loss": {"kind": "loss", "steps": [3], "rank": 1, "factor": float("inf")},
    }
    overrides = ["trainer.devices=2", f"trainer.engine={engine}"]
    results = on_ranks(2, fit_with, faults[fault], recipe, overrides, tmp_path)
    assert [code for code, _ in results] == [3, 3]
    assert all("diverged at step 3: " in message for _, message in results)
    assert status(tmp_path)["state"] == "diverged"
    found = report(tmp_path, 3)
    assert len(found["losses"]) == len(found["samples"]) == 2
    if fault == "sample":
        assert [(w["rank"], w["micro_batch"]) for w in found["worst_micro_batches"]] == [(1, 1)]
    elif fault == "loss":
        assert {w["rank"] for w in found["worst_micro_batches"]} == {1}
    else:
        assert found["layers"][0]["name"] == "head.fc.weight"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "vr_novograd"])
def test_a_skipped_step_leaves_no_trace(recipe: Path, tmp_path: Path, engine: str, optimizer: str) -> None:
    """Weights, running statistics and optimizer state are as before it, and the run goes on."""
    overrides = [f"trainer.engine={engine}", f"optimizer={{name: {optimizer}, lr: 0.01}}"]
    fault = {"kind": "sample", "index": a_sample_of(step=3, micro_batch=1)}
    skip = [*overrides, "trainer.divergence.policy=skip", "checkpoint.every_steps=1"]
    assert fit_with(fault, recipe, skip, tmp_path) == (0, "finished")
    assert status(tmp_path)["skipped_steps"] == 1
    lines = read_metrics(tmp_path / "small" / "1" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("summary/skipped_steps") for line in lines] == [None, None, 1.0, None, None, None]
    assert report(tmp_path, 3)["policy"] == "skip"
    folder = CheckpointFolder(tmp_path / "small" / "1" / "checkpoints")
    before, after = (everything_saved(folder.step_path(step)) for step in (2, 3))
    assert before.keys() == after.keys()
    different = [name for name, value in before.items() if isinstance(value, torch.Tensor)
                 and not torch.equal(value, after[name])]  # fmt: skip
    assert not different
    assert all(torch.isfinite(value).all() for value in saved_weights(tmp_path / "small" / "1").values())
    assert all("nan" not in str(line) for line in lines[3:]), "moving averages of the gradients stay clean"


def everything_saved(path: Path) -> dict[str, Any]:
    """All values of a checkpoint by their keys."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = path.parent / f"{path.name}.pt"
    dcp_to_torch_save(path, file)
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                walk(item, f"{key}.{name}")
        else:
            flat[key] = value

    walk(torch.load(file, weights_only=False), "")
    return flat


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_both_ranks_skip(recipe: Path, tmp_path: Path, strategy: str) -> None:
    fault = {"kind": "loss", "steps": [3], "rank": 1}
    overrides = ["trainer.devices=2", f"trainer.strategy={strategy}", "trainer.divergence.policy=skip"]
    assert [code for code, _ in on_ranks(2, fit_with, fault, recipe, overrides, tmp_path)] == [0, 0]
    assert status(tmp_path)["skipped_steps"] == 1
    assert all(layer["grad_norm"] == "nan" for layer in report(tmp_path, 3)["layers"])
    assert all(torch.isfinite(value).all() for value in saved_weights(tmp_path / "small" / "1").values())


def test_too_many_skipped_steps_in_a_row(recipe: Path, tmp_path: Path) -> None:
    overrides = ["trainer.divergence={policy: skip, at_most: 2}"]
    code, message = fit_with({"kind": "loss", "steps": [2, 4, 5, 6]}, recipe, overrides, tmp_path)
    assert code == 3
    assert "after 2 steps in a row that were left out, at step 6" in message


@pytest.mark.parametrize("engine", ENGINES)
def test_rollback_goes_on_from_the_last_checkpoint_with_a_smaller_rate(
    recipe: Path, tmp_path: Path, engine: str
) -> None:
    """The fault comes once, as divergence by too large a rate would; each step stands once in the log."""
    fault = {"kind": "loss", "steps": [3], "times": 1}
    overrides = [f"trainer.engine={engine}", "trainer.divergence={policy: rollback, lr_factor: 0.25}"]
    assert fit_with(fault, recipe, overrides, tmp_path) == (0, "finished")
    made = status(tmp_path)["rollbacks"]
    assert made == [{"step": 3, "to_step": 2, "stage": "train", "lr_factor": 0.25}]
    lines = read_metrics(tmp_path / "small" / "1" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["summary/lr"] for line in lines] == pytest.approx([0.01, 0.01, *[0.0025] * 4])
    assert [line.get("summary/rollbacks") for line in lines] == [None, None, 1.0, 1.0, 1.0, 1.0]


def test_a_report_that_finds_no_room(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said, and changes nothing about what happens."""

    def full(*args: Any, **kwargs: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(divergence, "write_report", full)
    code, message = fit_with({"kind": "loss", "steps": [3]}, recipe, [], tmp_path)
    assert code == 3
    assert message.endswith("the report could not be written: [Errno 28] No space left on device")
    fault = {"kind": "loss", "steps": [3], "times": 1}
    assert fit_with(fault, recipe, ["trainer.divergence.policy=skip"], tmp_path) == (0, "finished")


def test_rollbacks_come_to_an_end(recipe: Path, tmp_path: Path) -> None:
    """Before the first checkpoint it begins anew; a bad sample comes again, and again."""
    fault = {"kind": "sample", "index": a_sample_of(step=2, micro_batch=0)}
    overrides = ["trainer.divergence={policy: rollback, at_most: 2}"]
    code, message = fit_with(fault, recipe, overrides, tmp_path)
    assert code == 3
    assert message.startswith("after 2 rollbacks: diverged at step 2")
    assert [made["to_step"] for made in status(tmp_path)["rollbacks"]] == [0, 0]
    names = sorted(file.name for file in (tmp_path / "small" / "1" / "divergence").iterdir())
    assert names == ["step_00000002.2.json", "step_00000002.3.json", "step_00000002.json"]


@pytest.mark.dist
def test_both_ranks_roll_back(recipe: Path, tmp_path: Path) -> None:
    fault = {"kind": "loss", "steps": [5], "rank": 1, "times": 1}
    overrides = ["trainer.devices=2", "trainer.divergence.policy=rollback"]
    assert [code for code, _ in on_ranks(2, fit_with, fault, recipe, overrides, tmp_path)] == [0, 0]
    assert status(tmp_path)["state"] == "finished"
    assert status(tmp_path)["rollbacks"] == [{"step": 5, "to_step": 4, "stage": "train", "lr_factor": 0.5}]


def test_a_spike_of_the_loss(recipe: Path, tmp_path: Path) -> None:
    """Against the moving average, once there is one; a loss that only falls is none."""
    overrides = ["steps=26", "trainer.validate_every.steps=26", "logging.every=50"]
    code, message = fit_with({"kind": "loss", "steps": [25], "factor": 40.0}, recipe, overrides, tmp_path)
    assert code == 3
    assert "step 25: the loss is more than 10 times its moving average" in message


def test_nobody_looks(recipe: Path, tmp_path: Path) -> None:
    code, _ = fit_with({"kind": "loss", "steps": [2]}, recipe, ["trainer.divergence=null", "steps=3"], tmp_path)
    assert code == 0
