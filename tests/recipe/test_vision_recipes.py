"""The vision recipes: values of the papers and of MLPerf, what mini is made of, and runs on generated files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_factories import make_cifar10, make_imagenet_tree, make_mnist

import lbzoo
from lbzoo.papers import find_rows, load_paper
from lbzoo.recipe import build_schedule, build_task, load_recipe
from lbzoo.recipe.dry_run import dry_run

PERCENT = 100.0


def only_stage(recipe: str, *overrides: str, scale: str = "paper") -> Any:
    (stage,) = load_recipe(recipe, overrides, scale).stages  # type: ignore[arg-type]
    return stage


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("lenet_mnist", 61_706),
        ("davidnet_cifar10", 6_573_120),
        ("resnet56_cifar10", 853_018),
        ("resnet50_lamb", 25_557_032),
        ("resnet50_novograd_32k", 25_549_352),
    ],
)
def test_parameters_of_the_recipes(recipe: str, parameters: int) -> None:
    assert dry_run(only_stage(recipe)).parameters == parameters


def test_davidnet_and_lenet_are_those_of_lambs_tables() -> None:
    for recipe, table_id in (("davidnet_cifar10", "lamb/6"), ("lenet_mnist", "lamb/7")):
        resolved = load_recipe(recipe)
        (row,) = find_rows(table_id, {"optimizer": "lamb"})
        (stage,) = resolved.stages
        assert resolved.expect == {"val/top1": row["top1"]}
        assert (stage.epochs, stage.global_batch_size) == (row["epochs"], row["batch_size"])
        assert stage.optimizer.name == "lamb"


def test_davidnets_data_and_schedule_are_pages() -> None:
    stage = only_stage("davidnet_cifar10", "optimizer.name=nesterov", "optimizer.lr=0.4")
    assert {key: stage.data.options[key] for key in ("pad_with", "cutout")} == {"pad_with": "reflection", "cutout": 8}
    schedule = build_schedule(stage)
    epoch = 50_000 / 512
    knots = {0.0: 0.0, 2.5: 0.2, 5.0: 0.4, 14.5: 0.2, 24.0: 0.0}  # epoch: learning rate
    for at, lr in knots.items():
        assert 0.4 * schedule(max(round(at * epoch), 1)) == pytest.approx(lr, abs=0.002)


def test_pixels_are_normalised_by_the_facts_of_the_data() -> None:
    task = build_task(only_stage("davidnet_cifar10", "task.model_args={width: 4}"))
    assert (task.pixel_mean / 255).flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])  # type: ignore[union-attr,operator]
    task = build_task(only_stage("lenet_mnist"))
    assert (task.pixel_std / 255).flatten().tolist() == pytest.approx([0.3081])  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("name", ["nlamb", "nnlamb"])
def test_lamb_figure_1(name: str) -> None:
    (figure,) = (figure for figure in load_paper("lamb")["figures"] if figure["id"] == "lamb/fig1")
    given, stage = figure["inputs"], only_stage(f"resnet50_{name}_32k")
    options = stage.optimizer.options
    assert stage.optimizer.name == name
    assert (stage.global_batch_size, stage.epochs) == (given["batch_size"], given["epochs"])
    assert (options["betas"], options["eps"]) == ((given["beta1"], given["beta2"]), given["eps"])
    (lamb,) = find_rows("lamb/5", {"batch_size": 32768})
    assert (options["lr"], stage.schedule.warmup_epochs) == (lamb["lr"], lamb["warmup_epochs"])


def test_mlperfs_reference_point() -> None:
    """resnet_ref_32768 in mlcommons/logging, mlperf_logging/rcp_checker/training_4.0.0/rcps_resnet.json."""
    stage = only_stage("resnet50_lars_mlperf_32k")
    options, schedule = stage.optimizer.options, build_schedule(stage)
    assert (stage.global_batch_size, stage.micro_batch_size) == (32768, 128)
    assert (options["lr"], options["momentum"], options["weight_decay"]) == (21.2, 0.94, 2.5e-5)
    assert stage.schedule.warmup_epochs == 16
    assert stage.steps == 2267 + 1, "58 epochs, rounded up"
    assert 21.2 * schedule(stage.steps) == pytest.approx(1e-4, rel=1e-3)
    halfway = schedule.warmup_steps + (stage.steps - schedule.warmup_steps) // 2
    assert schedule(halfway) == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("name", ["lars", "vr_lars"])
@pytest.mark.parametrize("batch", [2048, 32768, 98304])
def test_lars_of_vrgd(name: str, batch: int) -> None:
    resolved = load_recipe(f"resnet50_{name}", [f"data.global_batch_size={batch}"])
    (stage,) = resolved.stages
    assert stage.task.options["label_smoothing"] == 0.1
    assert build_schedule(stage)(stage.steps) == 0.0
    assert stage.schedule.name == "cosine"
    assert stage.optimizer.options["lr"] == pytest.approx(29.0 * (batch / 32768) ** 0.5)
    assert "generalization_gap" in [callback.name for callback in resolved.callbacks]


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "adamw"])
def test_goyals_scheme_on_the_baselines_as_their_heads_say(optimizer: str) -> None:
    recipe = f"resnet50_{optimizer}"
    (best,) = find_rows("lamb/3", {"label": f"{optimizer}+"})
    assert f"top-1 {PERCENT * best['top1']:.2f}" in load_recipe(recipe).description.partition("\n")[2]
    scheme = ["schedule.name=multistep", "schedule.milestones=[30, 60, 80]", "schedule.warmup_epochs=5"]
    stage = only_stage(recipe, *scheme)
    schedule, epoch = build_schedule(stage), 1_281_167 / 16384
    assert [schedule(round(at * epoch)) for at in (29, 31, 61, 81)] == pytest.approx([1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("batch", [256, 512, 1024, 2048, 4096, 8192])
def test_resnet56_by_the_square_root(batch: int) -> None:
    sizes = [f"data.global_batch_size={batch}", f"data.micro_batch_size={batch // 8}"]
    stage = only_stage("resnet56_cifar10", *sizes)
    assert stage.optimizer.options["lr"] == pytest.approx(0.1 * (batch / 128) ** 0.5)
    assert stage.task.options["l2_regularization"] == 0.0002
    assert stage.schedule.warmup_epochs == 5


# --- Trained on files in the real formats -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "make", "overrides"),
    [
        ("lenet_mnist", lambda root: make_mnist(root, train=60, test=20), []),
        ("davidnet_cifar10", lambda root: make_cifar10(root, per_file=20), ["task.model_args={width: 4}"]),
        (
            "resnet56_cifar10",
            lambda root: make_cifar10(root, per_file=20),
            ["task.model=cifar_resnet20", "optimizer.name=vr_momentum"],
        ),
        (
            "resnet50_vr_lars",
            lambda root: make_imagenet_tree(root, classes=2, per_class=16, val_per_class=2),
            ["task.model=cifar_resnet20", "data.num_classes=2", "data.image_size=32", "data.resize_size=40"],
        ),
        (
            "resnet50_vr_lars",
            lambda root: make_imagenet_tree(root, classes=2, per_class=16, val_per_class=2),
            [
                "task.model=cifar_resnet20",
                "data.num_classes=2",
                "data.image_size=32",
                "data.resize_size=40",
                "trainer.engine=accelerate",
            ],
        ),
    ],
)
def test_two_steps_on_generated_files(recipe: str, make: Any, overrides: list[str], tmp_path: Path) -> None:
    sizes = ["data.global_batch_size=32", "data.micro_batch_size=4", "steps=2", "schedule.warmup_steps=1"]
    machine = ["trainer.precision=32-true", "trainer.devices=1", "trainer.accelerator=cpu", "trainer.num_workers=1"]
    root = make(tmp_path / "data")
    result = lbzoo.fit(recipe, [f"data.root={root}", *sizes, *overrides, *machine], runs=tmp_path / "runs")
    assert result.step == 2
    assert 0 <= result.metrics["val/top1"] <= 1
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["summary/generalization_gap"] for line in lines if "summary/generalization_gap" in line]
    if "generalization_gap" in [callback.name for callback in load_recipe(recipe).callbacks]:
        last = lines[-1]
        assert gaps[-1] == pytest.approx(last["train_subset/top1"] - last["val/top1"], abs=1e-6)
    else:
        assert gaps == []
