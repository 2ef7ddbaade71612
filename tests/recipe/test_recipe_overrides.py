"""``key.sub=value``: what can be addressed, and mistakes of the same quality as the file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from valid_recipe import VALID, Write

from lbzoo.recipe import RecipeError, load_recipe

STAGED = VALID + "stages: [{name: seq128, steps: 10}, {name: seq512, epochs: 1, optimizer: {lr: 0.5}}]\n"


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "at", "value"),
    [
        ("optimizer.lr=2e-3", ("optimizer", "lr"), 0.002),
        ("optimizer.betas=[0.9, 0.99]", ("optimizer", "betas"), [0.9, 0.99]),
        ("optimizer.betas.1=0.5", ("optimizer", "betas"), [0.95, 0.5]),
        ("optimizer.betas.-1=0.5", ("optimizer", "betas"), [0.95, 0.5]),
        ("callbacks.0.every=5", ("callbacks", 0, "every"), 5),
        ("callbacks.trust_ratio.every=5", ("callbacks", 0, "every"), 5),
        ("callbacks=[]", ("callbacks",), []),
        ("callbacks=[progress, {name: trust_ratio}]", ("callbacks", 0), {"name": "progress"}),
        ("schedule=polynomial", ("schedule", "name"), "polynomial"),
        ("task.model_args.layers=[1, 1, 1, 1]", ("task", "model_args"), {"layers": [1, 1, 1, 1]}),
        ("trainer.validate_every.steps=7", ("trainer", "validate_every"), {"steps": 7}),
        ("trainer.validate_every={steps: 7}", ("trainer", "validate_every", "steps"), 7),
        ("seed = 7", ("seed",), 7),
    ],
)
def test_what_can_be_set(valid: Path, override: str, at: tuple[Any, ...], value: Any) -> None:
    resolved = load_recipe(valid, [override])
    found: Any = resolved.document
    for key in at:
        found = found[key]
    assert found == value
    assert resolved.origins[at[:1] if at[0] == "callbacks" else at].text == override


def test_later_overrides_win(valid: Path) -> None:
    stage = load_recipe(valid, ["optimizer.lr=1", "optimizer.lr=2", "optimizer={lr: 3}"]).stages[0]
    assert stage.optimizer.options["lr"] == 3.0


def test_values_that_exclude_each_other_replace_each_other(valid: Path) -> None:
    stage = load_recipe(valid, ["steps=7", "schedule.warmup_steps=2"]).stages[0]
    assert (stage.steps, stage.epochs) == (7, None)
    assert (stage.schedule.warmup_steps, stage.schedule.warmup_epochs) == (2, None)


def test_param_rules_by_index(write: Write) -> None:
    path = write(VALID.replace("  lr: 1e-2", "  lr: 1e-2\n  param_rules: [{ndim: 1, weight_decay: 0.1}]"))
    stage = load_recipe(path, ["optimizer.param_rules.0.weight_decay=0.5"]).stages[0]
    assert stage.param_rules == ({"ndim": 1, "weight_decay": 0.5},)


@pytest.mark.parametrize("address", ["stages.seq512", "stages.1"])
def test_stages_by_name_and_index(write: Write, address: str) -> None:
    stages = load_recipe(write(STAGED), [f"{address}.optimizer.lr=0.25", f"{address}.steps=3"]).stages
    assert [stage.optimizer.options["lr"] for stage in stages] == [0.01, 0.25]
    assert [stage.steps for stage in stages] == [10, 3]


def test_a_stage_keeps_its_own_value(write: Write) -> None:
    stages = load_recipe(write(STAGED), ["optimizer.lr=0.125", "data.micro_batch_size=64"]).stages
    assert [stage.optimizer.options["lr"] for stage in stages] == [0.125, 0.5]
    assert [stage.micro_batch_size for stage in stages] == [64, 64]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=1", "override 'optimzer.lr=1': optimzer: unknown key; did you mean 'optimizer'?"),
        (
            "optimizer.bets=1",
            "override 'optimizer.bets=1': optimizer.bets: optimizer 'novograd' has no option 'bets'; did",
        ),
        ("seed=\udcff", "override 'seed=?': this is not UTF-8 text"),
        ("optimizer.lr", "override 'optimizer.lr': write an override as key.sub=value"),
        ("=1", "override '=1': write an override as key.sub=value"),
        ("optimizer..lr=1", "override 'optimizer..lr=1': write an override as key.sub=value"),
        ("optimizer.lr=", "override 'optimizer.lr=': optimizer.lr: expected a number, got nothing"),
        ("optimizer.lr=fast", "override 'optimizer.lr=fast': optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.betas=[0.9", "override 'optimizer.betas=[0.9': optimizer.betas: cannot read the value '[0.9'"),
        ("optimizer.betas.5=1", "override 'optimizer.betas.5=1': optimizer.betas: has no item '5'; it holds 0, 1"),
        (
            "optimizer.lr.x=1",
            "override 'optimizer.lr.x=1': optimizer.lr: is 0.01, which has no keys; 'x' cannot be set",
        ),
        (
            "callbacks.gsnr.every=1",
            "override 'callbacks.gsnr.every=1': callbacks: has no item 'gsnr'; it holds 0 (trust_ratio)",
        ),
        (
            "callbacks.trust_rato.every=1",
            "override 'callbacks.trust_rato.every=1': callbacks: has no item 'trust_rato'; did you mean 'trust_ratio'?",
        ),
        ("mini.epochs=3", "override 'mini.epochs=3': overrides are applied after the mini: block; leave 'mini.' out"),
        ("base=x", "override 'base=x': the base is the recipe's own"),
        ("stages.a.steps=1", "override 'stages.a.steps=1': stages.a: no stage named 'a'; this recipe has no stages"),
        (
            "data.global_batch_size=250",
            "override 'data.global_batch_size=250': data.global_batch_size: global_batch_size",
        ),
    ],
)
def test_mistakes(valid: Path, override: str, message: str) -> None:
    assert error_of(valid, override).startswith(message)


def test_a_misspelt_stage(write: Write) -> None:
    message = "override 'stages.seq51.steps=1': stages.seq51: no stage named 'seq51'; did you mean 'seq512'?"
    assert error_of(write(STAGED), "stages.seq51.steps=1") == message


def test_all_mistakes_of_all_overrides_and_of_the_file(write: Write) -> None:
    path = write(VALID.replace("cosine", "cosin"))
    text = error_of(path, "optimzer.lr=1", "epochs=no", "x")
    assert text.count("\n") == 4
    assert text.endswith("4 mistakes")
    assert "valid.yaml:9" in text


def test_a_misspelt_override_does_not_hide_the_value(valid: Path) -> None:
    assert "expected a number, got 'fast'" in error_of(valid, "optimzer.lr=fast")
