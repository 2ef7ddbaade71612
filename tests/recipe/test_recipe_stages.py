"""Stages: each is the top level changed by its own, and steps run through the whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo.recipe import RecipeError, build_schedule, load_recipe, with_sample_counts

STAGES = """\
stages:
  - {name: seq128, steps: 10}
  - name: seq512
    data: {image_size: 64, global_batch_size: 64}
    optimizer: {lr: 0.5}
    schedule: {warmup_steps: 2}
  - {name: squad, epochs: 1, optimizer: {name: adamw, lr: 0.1}, schedule: constant}
"""


@pytest.fixture
def staged(write: Write) -> Path:
    return write(VALID.replace("mini:\n  epochs: 1\n", "") + STAGES + "mini:\n  stages: {squad: {steps: 4}}\n")


def test_each_stage_is_the_top_level_changed_by_its_own(staged: Path) -> None:
    first, second, third = load_recipe(staged).stages
    assert [stage.name for stage in (first, second, third)] == ["seq128", "seq512", "squad"]
    assert [stage.index for stage in (first, second, third)] == [0, 1, 2]
    assert (first.global_batch_size, second.global_batch_size, third.global_batch_size) == (256, 64, 256)
    assert (first.data.options, second.data.options) == ({}, {"image_size": 64})
    assert second.task.options["input_shape"] == (1, 64, 64)
    assert second.optimizer.options == {"lr": 0.5, "betas": (0.95, 0.98)}
    assert (second.schedule.warmup_steps, second.schedule.warmup_epochs) == (2, None)
    assert (third.optimizer.name, third.optimizer.options) == ("adamw", {"lr": 0.1, "betas": (0.95, 0.98)})
    assert third.schedule.name == "constant"


def test_steps_run_through(staged: Path) -> None:
    stages = load_recipe(staged).stages
    assert [stage.steps for stage in stages] == [10, 68, 6]  # ceil(3 * 1437 / 64), ceil(1437 / 256)
    assert [stage.first_step for stage in stages] == [0, 10, 78]


def test_a_run_without_stages_is_one(valid: Path) -> None:
    (stage,) = load_recipe(valid).stages
    assert (stage.name, stage.index, stage.first_step) == ("train", 0, 0)


def test_mini_changes_a_stage_by_name(staged: Path) -> None:
    assert [stage.steps for stage in load_recipe(staged, scale="mini").stages] == [10, 68, 4]


def test_a_list_in_mini_says_which_stages_run(write: Write) -> None:
    path = write(VALID + "  stages: [{name: squad, steps: 4}, {name: seq128}]\n" + STAGES)
    stages = load_recipe(path, scale="mini").stages
    assert [(stage.name, stage.steps) for stage in stages] == [("squad", 4), ("seq128", 10)]
    assert stages[0].optimizer.name == "adamw"


def test_a_recipe_changes_the_stages_of_its_base(write: Write) -> None:
    write(VALID + STAGES, "base.yaml")
    path = write("version: 1\nbase: base.yaml\nstages: {seq128: {steps: 3}}\n", "top.yaml")
    assert [stage.steps for stage in load_recipe(path).stages] == [3, 68, 6]
    path = write("version: 1\nbase: base.yaml\nstages: {seq511: {steps: 3}}\n", "top.yaml")
    with pytest.raises(RecipeError, match=r"top.yaml:3: stages.seq511: no stage named 'seq511'; did you mean 'seq512'"):
        load_recipe(path)


def test_a_stage_drops_what_its_own_optimizer_lacks(write: Write) -> None:
    text = VALID + "stages: [{name: a, steps: 9}, {name: b, steps: 9, optimizer: {name: sgd}}]\n"
    resolved = load_recipe(write(text))
    assert [stage.optimizer.options for stage in resolved.stages] == [
        {"lr": 0.01, "betas": (0.95, 0.98)},
        {"lr": 0.01},
    ]
    assert resolved.notes == ("optimizer 'sgd' takes no betas: left out (written for 'novograd')",)


def test_everything_may_stand_in_the_stages(write: Write) -> None:
    text = """\
version: 1
stages:
  - name: only
    task: {name: image_classification, model: resnetv2_50}
    data: {name: digits, global_batch_size: 256, micro_batch_size: 32}
    optimizer: {name: novograd}
    steps: 3
"""
    (stage,) = load_recipe(write(text)).stages
    assert (stage.name, stage.steps, stage.schedule.name) == ("only", 3, "constant")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{steps: 1}]", "valid.yaml:15: stages.0.name: every stage needs a name, which is text"),
        ("[{name: 3, steps: 1}]", "valid.yaml:15: stages.0.name: every stage needs a name, which is text"),
        ("[{name: a}, {name: a}]", "valid.yaml:15: stages.1.name: two stages are named 'a'"),
        ("[a]", "valid.yaml:15: stages.0: a stage is a mapping with a name"),
        ("[]", "valid.yaml:15: stages: expected a list of stages, each with a name"),
        ("3", "valid.yaml:15: stages: expected a list of stages, each with a name"),
        ("{a: 3}", "valid.yaml:15: stages.a: a stage's changes are a mapping: {steps: 100}"),
        ("{a: {name: b, steps: 9}}", "valid.yaml:15: stages.a.name: this stage is 'a'; a stage cannot be renamed"),
        ("[{name: a, trainer: {}}]", "valid.yaml:15: stages.0.trainer: unknown key; known: data, epochs, lr_scaling"),
        ("[{name: a, optimzer: {}}]", "valid.yaml:15: stages.0.optimzer: unknown key; did you mean 'optimizer'?"),
        ("[{name: a, optimizer: {lr: x}}]", "valid.yaml:15: stages.0.optimizer.lr: expected a number, got 'x'"),
        (
            "[{name: a, data: {global_batch_size: 9}}]",
            "valid.yaml:15: stages.0.data.global_batch_size: global_batch_si",
        ),
    ],
)
def test_mistakes(write: Write, stages: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(VALID + f"stages: {stages}\n"))
    assert str(error.value.problems[0]).startswith(message)


def test_a_mistake_of_the_top_level_is_told_once(write: Write) -> None:
    path = write(VALID.replace("novograd", "novogard") + "stages: [{name: a, steps: 1}, {name: b, steps: 2}]\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert len(error.value.problems) == 1


# --- sums -------------------------------------------------------------------------------------------------------------


def test_learning_rate_and_warmup_are_scaled(write: Write) -> None:
    text = VALID + "lr_scaling: {rule: sqrt, base_global_batch_size: 64}\n"
    stage = load_recipe(write(text)).stages[0]
    assert stage.optimizer.options["lr"] == pytest.approx(0.01 * 2)
    assert stage.lr_before_scaling == 0.01
    assert stage.schedule.warmup_epochs == 2.0
    at_base = load_recipe(Path("valid.yaml"), ["data.global_batch_size=64"]).stages[0]
    assert build_schedule(at_base).warmup_steps == build_schedule(stage).warmup_steps


def test_steps_are_counted_again_for_the_samples_that_are_there(staged: Path) -> None:
    nominal = load_recipe(staged)
    found = with_sample_counts(nominal, {"squad": 700, "seq512": 640})
    assert [stage.steps for stage in found.stages] == [10, 30, 3]
    assert [stage.first_step for stage in found.stages] == [0, 10, 40]
    assert [stage.num_train for stage in found.stages] == [1437, 640, 700]
    assert found.hash != nominal.hash
    assert with_sample_counts(nominal, {}).hash == nominal.hash
    with pytest.raises(ValueError, match="5 training samples, fewer than the 8 micro-batches of a step"):
        with_sample_counts(nominal, {"squad": 5})


def test_smoke_is_two_steps_a_stage(staged: Path) -> None:
    for stage in load_recipe(staged, scale="smoke").stages:
        assert (stage.steps, stage.micro_batch_size, stage.global_batch_size) == (2, 8, 32)
        assert build_schedule(stage).warmup_steps == 1, "as there is a warmup"
    assert load_recipe(staged, ["stages.seq128.steps=5"], "smoke").stages[0].steps == 5
