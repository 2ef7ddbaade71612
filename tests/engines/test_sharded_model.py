"""FSDP2 as recipes ask for it: what comes out, what is refused, and what it costs in collectives."""

from __future__ import annotations

from pathlib import Path

import pytest
import shard_jobs
import torch
from distributed import on_ranks
from fit_jobs import fit_here
from parity_tasks import LayerNormNet
from torch import nn

from lbzoo.engines.activation_checkpointing import checkpoint_activations
from lbzoo.engines.launch import World, check_trainer
from lbzoo.engines.layers import unit_layers
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import UsageError
from lbzoo.recipe import RecipeError, load_recipe
from lbzoo.recipe.schema import TrainerSettings
from lbzoo.tasks.image_classification import ImageClassification
from lbzoo.testing.processes import JobError

RECIPE = """\
version: 1
task: {name: "parity_tasks:LayerNormNet"}
data: {name: "parity_tasks:Vectors", global_batch_size: 16, micro_batch_size: 4}
optimizer: {name: lamb, lr: 0.01}
steps: 4
trainer: {accelerator: cpu, strategy: fsdp}
logging: {every: 100, loggers: []}
callbacks: ["shard_jobs:CountCollectives"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "sharded.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("model", "unit", "count"),
    [
        ("cifar_resnet20", "BasicBlock", 9),
        ("resnet50", "Bottleneck", 16),
        ("resnetv2_50", "PreActBottleneck", 16),
        ("vit_tiny_patch16_224", "Block", 12),
        ("convnext_atto", "ConvNeXtBlock", 12),
        ("efficientnet_b0", "InvertedResidual", 15),
    ],
)
def test_the_units_of_image_classifiers(model: str, unit: str, count: int) -> None:
    with torch.device("meta"):
        task = ImageClassification(model=model, num_classes=10, input_shape=(3, 224, 224))
    names = [type(layer).__name__ for layer in unit_layers(task, None).values()]
    assert names.count(unit) == count


def net() -> LayerNormNet:
    return LayerNormNet(num_classes=3)


@pytest.mark.parametrize(
    ("patterns", "units"),
    [
        (None, ["model.1", "model.2"]),
        ([], []),
        (["Block", "Linear"], ["model.0", "model.1", "model.2", "model.3"]),  # the outermost
        (["model.*.up"], ["model.1.up", "model.2.up"]),
        (["Layer*", "model.[03]"], ["model.0", "model.1.norm", "model.2.norm", "model.3"]),
        (["Sequential"], ["model"]),
    ],
)
def test_patterns_of_a_recipe(patterns: list[str] | None, units: list[str]) -> None:
    assert list(unit_layers(net(), patterns)) == units


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("Blok", r"no layer matches 'Blok'; did you mean 'Block'\?"),
        ("model.1.upp", r"did you mean 'model\.1\.up'\?"),
        ("Conv2d", "known: Block, LayerNorm, Linear, Sequential"),
        ("GELU", "no layer matches"),  # has no parameters
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        unit_layers(net(), ["Block", pattern])


@pytest.mark.dist
def test_what_comes_out() -> None:
    units = ["", "model.1", "model.2"]
    for rank, found in enumerate(on_ranks(2, shard_jobs.layout, {})):
        assert found["units"] == units
        assert (found["mesh"], found["placements"], found["dtype"]) == ((2,), ["S(0)"], torch.float32)
        assert found["shard"] == (14, 9), rank
    hsdp = on_ranks(4, shard_jobs.layout, {"shard_size": 2})
    assert all((found["mesh"], found["placements"]) == ((2, 2), ["R", "S(0)"]) for found in hsdp)
    alone = on_ranks(1, shard_jobs.layout, {"precision": "bf16-true", "layers": []})[0]
    assert (alone["units"], alone["mesh"], alone["dtype"]) == ([""], (1,), torch.bfloat16)
    assert on_ranks(2, shard_jobs.layout, {"shard_size": 2})[0]["mesh"] == (2,)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("net", {"layers": ["Blocks"]}, "UsageError: trainer.fsdp.layers: no layer matches 'Blocks'; did you mean"),
        (
            "tied",
            {},
            "UsageError: strategy: fsdp: 'model.0.weight' and 'model.1.weight' are one parameter in two units",
        ),
        ("tied", {"layers": ["model.1"]}, "(the rest of the model and model.1)"),
        ("tied", {"layers": []}, ""),
        ("scalar", {}, "UsageError: strategy: fsdp: parameter 'scale' has no dimension to shard"),
        ("l2", {"reshard_after_forward": True}, "UsageError: trainer.fsdp.reshard_after_forward: the loss of"),
        ("l2", {}, ""),
    ],
)
def test_what_cannot_be_sharded_is_refused(kind: str, options: dict[str, object], message: str) -> None:
    found = on_ranks(2, shard_jobs.error_of, kind, options)[0]
    assert message in found if message else not found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("skipped", "message"),
    [("Block", "there are 1 units and not 3"), ("LayerNormNet", "'model.0.weight' is not sharded over")],
)
def test_what_came_out_is_checked(skipped: str, message: str) -> None:
    found = on_ranks(2, shard_jobs.error_of_a_policy_that_came_to_nothing, skipped)[0]
    assert found.startswith("LbzooError: strategy: fsdp has come to something else: ")
    assert message in found


@pytest.mark.dist
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-12), ("bf16-mixed", 1e-6)])
def test_gradients_are_those_of_one_process(precision: str, tolerance: float) -> None:
    """Of a loss that reads the weights, with BatchNorm, with and without activation checkpointing, sharded or not.

    Where BatchNorm is, weights travel in float32 under autocast too, and nothing is rounded that DDP does not round.
    """
    expected = on_ranks(1, shard_jobs.gradients, precision, False, False)[0]
    for checkpointing, ranks, sharded in [(True, 1, False), (False, 2, True), (True, 2, True)]:
        found = on_ranks(ranks, shard_jobs.gradients, precision, checkpointing, sharded)[0]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = max(value.abs().max().item(), 1e-3)
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=name)


def test_activations_are_computed_anew_and_names_stay() -> None:
    task, calls = net(), []
    names = list(task.state_dict())
    task.model[1].up.register_forward_hook(lambda *_: calls.append(1))
    batch = torch.randn(4, 10), torch.zeros(4, dtype=torch.long)
    task.training_step(batch, 0).backward()
    assert len(calls) == 1
    checkpoint_activations(task, TrainerSettings(activation_checkpointing=True))
    assert list(task.state_dict()) == names
    calls.clear()
    task.training_step(batch, 0).backward()
    assert len(calls) == 2
    with torch.no_grad():
        task.training_step(batch, 0)
    assert len(calls) == 3


def test_dropout_is_the_same_when_computed_anew() -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        task = net()
        checkpoint_activations(task, TrainerSettings(activation_checkpointing=checkpointing))
        batch = torch.randn(4, 10), torch.zeros(4, dtype=torch.long)
        torch.manual_seed(5)
        task.training_step(batch, 0).backward()
        grads.append([parameter.grad for parameter in task.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_without_layers_is_refused() -> None:
    task = net()
    task.model = nn.Linear(10, 3)  # type: ignore[assignment]
    with pytest.raises(UsageError, match="LayerNormNet with this model names no layers"):
        checkpoint_activations(task, TrainerSettings(activation_checkpointing=True))


@pytest.mark.dist
def test_a_validation_leaves_no_gathered_weights() -> None:
    assert on_ranks(2, shard_jobs.weights_after_a_validation) == [[False, True]] * 2


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 1), (2, 2)])
def test_collectives_of_a_step(recipe: Path, tmp_path: Path, ranks: int, micro_batches: int) -> None:
    """Those of a bare loop, and the optimizer's: one all_reduce for LAMB, one more for clipping.

    With gradient statistics every micro-batch is reduced, and VR-LAMB adds one all_reduce to LAMB's. The watch for
    divergence sends a handful of numbers behind the training's back.
    """
    alone = "trainer.divergence=null"
    bare = on_ranks(ranks, shard_jobs.collectives_of_a_bare_loop, micro_batches)[0]
    assert bare["scatter"] == 3  # of the last micro-batch, one a unit
    job = (ranks, shard_jobs.collectives_of_a_run, recipe)
    assert on_ranks(*job, [alone, "optimizer={name: sgd, lr: 0.1}"], tmp_path)[0] == bare
    for engine in ("lightning", "accelerate"):
        assert on_ranks(*job, [alone, f"trainer.engine={engine}"], tmp_path)[0] == {**bare, "allreduce": 1}
    assert on_ranks(*job, [], tmp_path)[0] == {**bare, "allreduce": 2}
    assert on_ranks(*job, [alone, "trainer.gradient_clip_norm=1"], tmp_path)[0] == {**bare, "allreduce": 2}
    for engine in ("lightning", "accelerate"):
        found = on_ranks(*job, [alone, "optimizer.name=vr_lamb", f"trainer.engine={engine}"], tmp_path)[0]
        assert found == {**bare, "scatter": 3 * micro_batches, "allreduce": 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.strategy=ddp", "trainer.fsdp.shard_size=2"], "fsdp has options, but strategy is ddp"),
        (["trainer.strategy=auto", "trainer.fsdp={}"], "fsdp has options, but strategy is auto"),
        (["trainer.fsdp.shardsize=2"], "shard_size"),
        (["trainer.fsdp.layers=Block"], "a list"),
        (["trainer.fsdp.shard_size=0"], "shard_size"),
    ],
)
def test_recipes_that_contradict_themselves(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_layout_is_no_part_of_the_training(recipe: Path) -> None:
    words = ["trainer.fsdp={shard_size: 2, layers: [Block], reshard_after_forward: false}",
             "trainer.activation_checkpointing=true"]  # fmt: skip
    assert load_recipe(recipe, words).hash == load_recipe(recipe, ["trainer.strategy=ddp"]).hash


@pytest.mark.parametrize(
    ("devices", "shard_size", "message"),
    [
        (4, 3, "shard_size: 3 does not divide the 4 devices of the run; use one of 2, 4, or leave it out"),
        (4, 8, "shard_size: 8 does not divide"),
        (4, 1, "shard_size: 1 is strategy: ddp"),
        (1, 2, "does not divide the 1 devices of the run; use more devices, or leave it out"),
    ],
)
def test_shard_sizes_that_do_not_work_out(devices: int, shard_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_trainer(shard_jobs.settings(shard_size=shard_size), World("cpu", devices, 1))


def test_half_precision_needs_a_gpu(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="16-mixed needs a GPU"):
        fit_here(recipe, ["trainer.precision=16-mixed"], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.dist
def test_an_unknown_layer_ends_a_run_before_its_first_step(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"UsageError: trainer\.fsdp\.layers: no layer matches 'Blok'"):
        on_ranks(2, fit_here, recipe, ["trainer.fsdp.layers=[Blok]"], tmp_path / "runs")
    run = RunFolder(tmp_path / "runs" / "sharded" / "1")
    assert (run.status()["state"], run.status()["exit_code"]) == ("failed", 2)
    assert not run.metrics_file.exists()
