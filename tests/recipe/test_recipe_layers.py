"""base < recipe < table row < scale block < command line, and what passes from one layer to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo.recipe import load_recipe, to_yaml
from lbzoo.recipe.layers import row_document
from lbzoo.recipe.schema import Scale

BASE = """\
version: 1
task: {name: image_classification, model: resnetv2_50, drop_rate: 0.1}
data: {name: digits, global_batch_size: 256, micro_batch_size: 32}
optimizer: {name: novograd, lr: 1.0, weight_decay: 1.0, eps: 1.0}
epochs: 3
hardware: {devices: 8}
table: {id: novograd/3, row: {batch_size: 32768}}
expect: {val/top1: 0.9, val/top5: 0.95}
mini: {epochs: 1, optimizer: {eps: 4.0}}
"""
TOP = """\
version: 1
base: base.yaml
optimizer: {lr: 2.0, weight_decay: 2.0, eps: 2.0}
mini: {optimizer: {lr: 4.0}}
"""


@pytest.fixture
def top(write: Write) -> Path:
    write(BASE, "base.yaml")
    return write(TOP, "top.yaml")


def options(path: Path, *overrides: str, **arguments: object) -> dict[str, float]:
    return load_recipe(path, overrides, **arguments).stages[0].optimizer.options  # type: ignore[arg-type]


def test_each_layer_beats_those_below(top: Path) -> None:
    row = {"optimizer": {"weight_decay": 3.0, "lr": 3.0}}
    assert options(top) == {"lr": 2.0, "weight_decay": 2.0, "eps": 2.0}
    assert options(top, row=row) == {"lr": 3.0, "weight_decay": 3.0, "eps": 2.0}
    assert options(top, row=row, scale="mini") == {"lr": 4.0, "weight_decay": 3.0, "eps": 4.0}
    assert options(top, "optimizer.lr=5", row=row, scale="mini") == {"lr": 5.0, "weight_decay": 3.0, "eps": 4.0}


def test_a_row_drops_what_the_recipe_says_of_its_own(top: Path) -> None:
    row = {"table": {"id": "novograd/3", "row": {"batch_size": 8192}}, "expect": {"val/top1": 0.8}}
    resolved = load_recipe(write_into(top, "expect: {val/top1: 0.7}\nhardware: {devices: 4}\n"), row=row)
    assert resolved.hardware is None
    assert resolved.table is not None
    assert (resolved.table.row, resolved.expect) == ({"batch_size": 8192}, {"val/top1": 0.8})


def write_into(path: Path, more: str) -> Path:
    path.write_text(path.read_text() + more)
    return path


@pytest.mark.parametrize("optimizer", [{"weight_decay": 3.0}, {"name": "adam"}, {"name": "momentum", "momentum": 0.5}])
@pytest.mark.parametrize("scale", ["paper", "mini", "smoke"])
def test_a_row_s_document_is_a_recipe_of_its_own(
    top: Path, write: Write, scale: Scale, optimizer: dict[str, object]
) -> None:
    Path("base.yaml").write_text(BASE.replace(", optimizer: {eps: 4.0}", ""))
    row = {"optimizer": optimizer, "data": {"global_batch_size": 512}, "mini": {"epochs": 2}}
    whole = write(to_yaml(row_document(top, row)), "elsewhere/whole.yaml")
    assert load_recipe(whole, scale=scale).hash == load_recipe(top, scale=scale, row=row).hash


def test_every_value_remembers_its_layer(top: Path) -> None:
    origins = (
        load_recipe(top, ["optimizer.eps=5"], scale="mini", row={"optimizer": {"weight_decay": 3.0}}).stages[0].origins
    )
    found = {path: (origin.source, origin.file, origin.line) for path, origin in origins.items()}
    assert found["task", "model"] == ("base", "base.yaml", 2)
    assert found["optimizer", "lr"] == ("recipe", "top.yaml", 4)
    assert origins["optimizer", "lr"].path == ("mini", "optimizer", "lr")
    assert found["optimizer", "weight_decay"] == ("row", None, None)
    assert found["optimizer", "eps"] == ("override", None, None)
    assert found["task", "num_classes"] == ("facts", None, None)


def test_what_a_base_says_of_its_paper_stays_with_it(top: Path) -> None:
    resolved = load_recipe(top)
    assert resolved.table is None
    assert resolved.hardware is None
    assert resolved.expect == {}


def test_what_a_recipe_says_of_its_paper_is_not_of_its_mini(write: Write) -> None:
    path = write(BASE.replace("epochs: 1,", "epochs: 1, expect: {val/top1: 0.5},"))
    assert load_recipe(path).expect == {"val/top1": 0.9, "val/top5": 0.95}
    mini = load_recipe(path, scale="mini")
    assert (mini.table, mini.hardware, mini.expect) == (None, None, {"val/top1": 0.5})


def test_a_base_by_name_and_relative_to_the_recipe(write: Write) -> None:
    write(BASE, "recipes/lower.yaml")
    by_name = load_recipe(write("version: 1\nbase: lower\n", "a.yaml"))
    by_path = load_recipe(write("version: 1\nbase: lower.yaml\n", "recipes/b.yaml"))
    assert by_name.stages == by_path.stages


def test_a_base_beside_the_recipe_is_meant_before_one_of_the_same_name(write: Write) -> None:
    write(BASE.replace("epochs: 3", "epochs: 9"), "recipes/lower.yaml")
    write(BASE, "zoo/lower.yaml")
    assert load_recipe(write("version: 1\nbase: lower\n", "zoo/top.yaml")).stages[0].epochs == 3


def test_a_list_replaces_a_list(write: Write) -> None:
    write(VALID, "base.yaml")
    path = write("version: 1\nbase: base.yaml\ncallbacks: [progress]\n", "top.yaml")
    assert [callback.name for callback in load_recipe(path).callbacks] == ["progress"]


def test_a_key_without_a_value_says_nothing(write: Write) -> None:
    write(VALID, "base.yaml")
    path = write("version: 1\nbase: base.yaml\ncallbacks:\nschedule:\n  # name: cosine\ntrainer:\n", "top.yaml")
    resolved = load_recipe(path)
    assert [callback.name for callback in resolved.callbacks] == ["trust_ratio"]
    assert resolved.stages[0].schedule.name == "cosine"
    assert resolved.trainer.precision == "bf16-mixed"


def test_null_takes_an_optional_block_away(write: Write) -> None:
    path = write(VALID + "  lr_scaling:\nlr_scaling: {rule: linear, base_global_batch_size: 128}\n")
    assert load_recipe(path).stages[0].optimizer.options["lr"] == 0.02
    assert load_recipe(path, scale="mini").stages[0].optimizer.options["lr"] == 0.01


def test_a_component_may_be_its_name_alone(write: Write) -> None:
    path = write(VALID.replace("{name: cosine, warmup_epochs: 0.5}", "cosine"))
    assert load_recipe(path).stages[0].schedule.name == "cosine"


def test_the_resolved_document_is_a_recipe_of_the_same_training(top: Path, write: Write) -> None:
    import yaml

    for scale in ("paper", "mini", "smoke"):
        resolved = load_recipe(top, ["optimizer.lr=5", "callbacks=[trust_ratio]"], scale)  # type: ignore[arg-type]
        again = load_recipe(write(yaml.safe_dump(resolved.document), f"{scale}.yaml"))
        assert again.hash == resolved.hash
        assert again.stages == resolved.stages
        assert again.document == resolved.document


# --- another component ------------------------------------------------------------------------------------------------


def test_options_that_the_new_optimizer_lacks_are_left_out_with_a_note(valid: Path) -> None:
    resolved = load_recipe(valid, ["optimizer.name=sgd"])
    assert resolved.stages[0].optimizer.options == {"lr": 0.01}
    assert resolved.notes == ("optimizer 'sgd' takes no betas: left out (written for 'novograd')",)
    assert "betas" not in resolved.document["optimizer"]


def test_options_that_it_takes_stay(valid: Path) -> None:
    resolved = load_recipe(valid, ["optimizer=adamw"])
    assert resolved.stages[0].optimizer.options == {"lr": 0.01, "betas": (0.95, 0.98)}
    assert resolved.notes == ()


def test_an_option_of_the_new_optimizer_in_the_same_breath(valid: Path) -> None:
    resolved = load_recipe(valid, ["optimizer.name=momentum", "optimizer.momentum=0.8"])
    assert resolved.stages[0].optimizer.options == {"lr": 0.01, "momentum": 0.8}


def test_an_option_that_neither_takes_is_a_mistake(write: Write) -> None:
    path = write(VALID.replace("betas:", "betos:"))
    with pytest.raises(ValueError, match="optimizer 'sgd' has no option 'betos'"):
        load_recipe(path, ["optimizer.name=sgd"])


def test_options_come_back_with_the_name(write: Write) -> None:
    path = write(VALID.replace("  epochs: 1", "  optimizer: sgd"))
    assert load_recipe(path, ["optimizer.name=novograd"], "mini").stages[0].optimizer.options["betas"] == (0.95, 0.98)


def test_parameter_rules_lose_what_the_new_optimizer_lacks(write: Write) -> None:
    rules = "[{ndim: 1, weight_decay: 0.1, adapt: false}, {match: x, adapt: false}]"
    path = write(VALID.replace("novograd", "lamb").replace("  lr: 1e-2", f"  lr: 1e-2\n  param_rules: {rules}"))
    assert len(load_recipe(path).stages[0].param_rules) == 2
    resolved = load_recipe(path, ["optimizer.name=adamw"])
    assert resolved.stages[0].param_rules == ({"ndim": 1, "weight_decay": 0.1},)
    assert resolved.notes == ("optimizer 'adamw' takes no adapt: left out of param_rules",)


def test_options_of_other_data_and_tasks_are_left_out_too(write: Write) -> None:
    text = VALID.replace("name: digits", "name: imagenet, train_crop: random, root: /none")
    resolved = load_recipe(write(text.replace("  epochs: 1", "  data: {name: digits}")), scale="mini")
    assert resolved.stages[0].data.options == {}
    assert resolved.notes == (
        "data 'digits' takes no train_crop: left out (written for 'imagenet')",
        "data 'digits' takes no root: left out (written for 'imagenet')",
    )


def test_shapes_options_are_left_out_and_the_warmup_stays(write: Write) -> None:
    text = VALID.replace("{name: cosine, warmup_epochs: 0.5}", "{name: polynomial, power: 2.0, warmup_steps: 3}")
    resolved = load_recipe(write(text), ["schedule.name=cosine"])
    assert resolved.stages[0].schedule.model_dump(exclude_none=True) == {"name": "cosine", "warmup_steps": 3}
