"""What show, plan and schema print from: the annotated recipe, the sums, the JSON schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo import registry
from lbzoo.recipe import load_recipe
from lbzoo.recipe.annotate import annotate
from lbzoo.recipe.arithmetic import batch_sum, lr_arithmetic, shards, steps_arithmetic
from lbzoo.recipe.dry_run import dry_run, summarise
from lbzoo.recipe.json_schema import recipe_schema
from lbzoo.recipe.planning import plan_stage
from lbzoo.recipe.schema import Recipe

RESNET50_V2 = 25_549_352  # parameters of timm's resnetv2_50 for 1000 classes


def remarks(path: Path, *overrides: str, scale: str = "paper") -> dict[str, str]:
    lines = annotate(load_recipe(path, overrides, scale))  # type: ignore[arg-type]
    return {line.text.strip(): line.remark for line in lines}


def test_every_value_says_where_it_is_from(write: Write) -> None:
    write(VALID, "base.yaml")
    top = write(
        "version: 1\nbase: base.yaml\noptimizer: {weight_decay: 0.5}\nmini: {logging: {every: 5}}\n", "top.yaml"
    )
    found = remarks(top, "seed=3", scale="mini")
    assert found["seed: 3"] == "override"
    assert found["weight_decay: 0.5"] == "line 3"
    assert found["lr: 0.01"] == "base.yaml:7"
    assert found["every: 5"] == "mini, line 4"
    assert found["steps: 6"] == "ceil(1 epochs x 1,437 / 256), mini, base.yaml:14"
    assert found["num_classes: 10"] == "from digits"
    assert found["amsgrad: false"] == "default"
    assert found["engine: lightning"] == "default"


def test_scaled_rates_are_spelled_out(write: Write) -> None:
    found = remarks(write(VALID + "lr_scaling: {rule: sqrt, base_global_batch_size: 64}\n"))
    assert found["lr: 0.02"] == "0.01 x sqrt(256 / 64), line 7"
    assert found["warmup_epochs: 2.0"] == "scaled with the batch, line 9"


STAGES = "stages: [{name: one, steps: 9}, {name: two, epochs: 1, optimizer: sgd, lr_scaling: null}]\n"


@pytest.mark.parametrize("extra", ["", "lr_scaling: {rule: linear, base_global_batch_size: 128}\n", STAGES])
@pytest.mark.parametrize("scale", ["paper", "mini", "smoke"])
def test_what_is_shown_is_a_recipe_of_the_same_training(write: Write, extra: str, scale: str) -> None:
    resolved = load_recipe(write(VALID + extra), scale=scale)  # type: ignore[arg-type]
    shown = "\n".join(f"{line.text}  # {line.remark}" for line in annotate(resolved))
    again = load_recipe(write(shown, "shown.yaml"))
    for ours, theirs in zip(resolved.stages, again.stages, strict=True):
        for key in ("name", "steps", "first_step", "global_batch_size", "micro_batch_size", "num_train", "param_rules"):
            assert getattr(ours, key) == getattr(theirs, key)
        for kind in ("task", "data", "optimizer"):
            written, filled = getattr(ours, kind), getattr(theirs, kind)
            assert written.name == filled.name
            assert filled.options.items() >= written.options.items()
    assert resolved.trainer == again.trainer
    assert [callback.name for callback in resolved.callbacks] == [callback.name for callback in again.callbacks]
    assert annotate(again)[0].text == "version: 1"


# --- sums -------------------------------------------------------------------------------------------------------------


def test_sums_of_the_headline_as_the_paper_ran_it() -> None:
    (stage,) = load_recipe("resnet50_novograd_32k").stages
    paper = batch_sum(stage, where="paper", device="V100", devices=8, num_nodes=1)
    assert paper.accumulation == 32
    assert 128 * 8 * 32 == 32768
    split = shards(stage)
    assert (split.count, split.samples, split.rotating) == (256, 5004, 143)
    assert split.count * split.samples + split.rotating == 1281167
    assert steps_arithmetic(stage) == "ceil(90 epochs x 1,281,167 / 32,768)"
    assert lr_arithmetic(stage) == ""


def test_a_batch_that_does_not_divide_here_says_what_does() -> None:
    (stage,) = load_recipe("resnet50_novograd_32k").stages
    here = batch_sum(stage, where="here", device="", devices=3, num_nodes=2)
    assert here.accumulation is None
    assert "global_batch_size 32768 is no multiple of micro_batch_size 128 x 6 devices" in here.problem


def test_plan_of_the_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = load_recipe("resnet50_novograd_32k", ["schedule.warmup_steps=500"])
    plan = plan_stage(resolved, resolved.stages[0])
    assert [batch.where for batch in plan.batches] == ["as the paper ran it", "here"]
    assert (plan.steps, plan.warmup_steps, plan.constant_steps) == (3519, 500, 0)
    assert plan.samples == 3519 * 32768
    assert plan.epochs == pytest.approx(90, abs=32768 / 1281167)
    assert plan.model is not None
    assert plan.model.parameters == RESNET50_V2
    assert plan.model.weight_bytes == 4 * RESNET50_V2
    layers = plan.model.tensors
    assert 4 * RESNET50_V2 <= plan.model.optimizer_bytes <= 4 * RESNET50_V2 + 16 * layers, "NovoGrad keeps one copy"  # type: ignore[operator]


def test_optimizer_memory_is_what_a_step_leaves(valid: Path) -> None:
    overrides = ["task.model=resnet18", "task.model_args={}", "optimizer.name=adamw"]
    run = dry_run(load_recipe(valid, overrides).stages[0])
    assert run.optimizer_bytes is not None
    assert 2 * run.weight_bytes <= run.optimizer_bytes < 2.001 * run.weight_bytes


def test_a_model_that_cannot_be_built_costs_only_its_lines(valid: Path) -> None:
    resolved = load_recipe(valid, ["task.model=resnet5000"])
    plan = plan_stage(resolved, resolved.stages[0])
    assert plan.model is None
    assert "resnet5000" in plan.model_problem
    assert plan.steps == 17


def test_parameter_groups_are_those_of_the_real_model(write: Write) -> None:
    rules = "[{ndim: 1, weight_decay: 0.0}, {match: 'nothing*', lr_scale: 2.0}]"
    text = VALID.replace("  lr: 1e-2", f"  lr: 1e-2\n  weight_decay: 0.5\n  param_rules: {rules}")
    run = dry_run(load_recipe(write(text), ["task.model=resnet18"]).stages[0])
    decays = {group.options["weight_decay"]: group for group in run.groups}
    assert all(len(shape) == 1 for _, shape in decays[0.0].parameters)
    assert all(len(shape) > 1 for _, shape in decays[0.5].parameters)
    assert sum(len(group.parameters) for group in run.groups) == run.tensors == 62
    assert ("model.conv1.weight", (64, 1, 7, 7)) in decays[0.5].parameters
    assert run.warnings == ("param_rules: no parameter matches match='nothing*'",)
    patterns = {pattern: count for pattern, _, count in summarise(decays[0.5])}
    assert patterns["model.layer*.*.conv*.weight"] == 16


# --- the JSON schema --------------------------------------------------------------------------------------------------


def test_schema_knows_every_key_and_every_component() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    for kind in ("task", "data", "optimizer", "schedule", "callback"):
        by_name, block = schema["$defs"][kind]["anyOf"]
        names = getattr(registry, f"{kind}s" if kind != "data" else "data").names()
        assert by_name["anyOf"][0]["enum"] == names
        assert [rule["if"]["properties"]["name"]["const"] for rule in block["allOf"]] == names


def test_schema_describes_options() -> None:
    _, block = recipe_schema()["$defs"]["optimizer"]["anyOf"]
    novograd = next(rule["then"] for rule in block["allOf"] if rule["if"]["properties"]["name"]["const"] == "novograd")
    assert novograd["additionalProperties"] is False
    assert set(novograd["properties"]) >= {"name", "lr", "betas", "weight_decay", "param_rules"}
    assert novograd["properties"]["lr"] == {"type": "number", "default": 0.01}
    assert novograd["properties"]["betas"]["default"] == [0.95, 0.25]


def test_schema_refers_only_to_what_it_defines() -> None:
    schema = recipe_schema()
    references = set(re.findall(r"#/\$defs/(\w+)", str(schema)))
    assert references <= set(schema["$defs"])


def test_every_key_of_a_recipe_is_described() -> None:
    """Units stand in the descriptions."""
    from lbzoo.recipe import schema as models

    def is_block(annotation: object) -> bool:
        return isinstance(annotation, type) and issubclass(annotation, models.BaseModel)

    undescribed = [
        f"{model.__name__}.{name}"
        for model in vars(models).values()
        if is_block(model)
        for name, field in model.model_fields.items()
        if not field.description and not is_block(field.annotation)  # a block's own docstring describes it
    ]
    assert undescribed == []
