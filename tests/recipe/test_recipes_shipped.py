"""Every recipe of the zoo: sound at every scale, with a head, and with the papers' numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lbzoo.papers import find_rows
from lbzoo.recipe import ResolvedRecipe, build_data, load_recipe
from lbzoo.recipe.checking import check_recipe
from lbzoo.recipe.finding import PACKAGE_RECIPES

SHIPPED = sorted(path for path in PACKAGE_RECIPES.rglob("*.yaml") if path.parent.name != "tables")
PERCENT = 100.0

every_recipe = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


def test_there_are_recipes() -> None:
    assert {"resnet50_novograd_1k", "resnet50_novograd_8k", "resnet50_novograd_32k"} <= {path.stem for path in SHIPPED}


@every_recipe
def test_sound_at_every_scale(path: Path) -> None:
    scales, problems = check_recipe(path)
    assert problems == []
    assert scales == ["paper", "mini", "smoke"], "every recipe has a mini: block"


@every_recipe
def test_begins_with_its_command_paper_hardware_and_mini(path: Path) -> None:
    head = load_recipe(path).description.splitlines()
    relative = path.relative_to(PACKAGE_RECIPES).as_posix()
    assert head[0].startswith(f"lbzoo fit recipes/{relative} ")
    text = "\n".join(head)
    for said in ("paper ", "hardware ", f"mini       lbzoo fit recipes/{relative} --scale mini", "arXiv"):
        assert said in text


@every_recipe
def test_the_commands_in_the_head_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE_RECIPES.resolve().parent)
    commands = re.findall(r"lbzoo fit (\S+)((?: [\w.]+=\S+)*)(?: --scale (\w+))?", load_recipe(path).description)
    assert len(commands) >= 2
    for recipe, overrides, scale in commands:
        load_recipe(recipe, overrides.split(), scale or "paper")


@every_recipe
def test_mini_is_the_same_recipe_on_embedded_data(path: Path) -> None:
    paper, mini = load_recipe(path), load_recipe(path, scale="mini")
    for ours, theirs in zip(mini.stages, paper.stages, strict=True):
        assert ours.task.name == theirs.task.name
        assert ours.optimizer.name == theirs.optimizer.name
        assert ours.schedule.name == theirs.schedule.name
        build_data(ours).prepare()  # raises where files are needed
    assert [callback.name for callback in mini.callbacks] == [callback.name for callback in paper.callbacks]
    assert mini.expect, "a mini recipe says what it reaches"
    left_out = [note for note in mini.notes if not note.startswith("data ")]  # other data, another augmentation
    assert left_out == [], "nothing is left out of a recipe of ours without its author's doing"


# --- NovoGrad, tables 1 to 3 ------------------------------------------------------------------------------------------

NOVOGRAD = {1024: "resnet50_novograd_1k", 8192: "resnet50_novograd_8k", 32768: "resnet50_novograd_32k"}


def row_of(resolved: ResolvedRecipe) -> dict[str, Any]:
    assert resolved.table is not None
    (row,) = find_rows(resolved.table.id, resolved.table.row)
    return row


@pytest.mark.parametrize("batch", NOVOGRAD)
def test_novograd_table_3(batch: int) -> None:
    resolved = load_recipe(NOVOGRAD[batch])
    row, (stage,) = row_of(resolved), resolved.stages
    assert row["batch_size"] == stage.global_batch_size == batch
    options = stage.optimizer.options
    assert options["lr"] == row.get("lr_recommended", row["lr"])
    assert options["weight_decay"] == row["weight_decay"]
    assert options["betas"] == (0.95, row["beta2"])
    assert stage.epochs == row["epochs"]
    assert (stage.schedule.name, row["schedule"]) == ("cosine", "cosine decay")
    assert (stage.schedule.warmup_steps, stage.schedule.warmup_epochs, stage.schedule.warmup_ratio) == (None,) * 3
    assert stage.micro_batch_size == row["minibatch_per_gpu"]
    assert resolved.expect["val/top1"] == pytest.approx(row["top1"] / PERCENT)
    assert resolved.expect["val/top5"] == pytest.approx(row["top5"] / PERCENT)
    assert resolved.hardware is not None
    assert (resolved.hardware.devices, resolved.hardware.device) == (8, "V100")


@pytest.mark.parametrize("batch", [8192, 32768])
def test_novograd_table_2(batch: int) -> None:
    (row,) = find_rows("novograd/2", {"optimizer": "novograd", "batch_size": batch, "tricks": []})
    resolved = load_recipe(NOVOGRAD[batch])
    (stage,) = resolved.stages
    assert stage.optimizer.options["lr"] == row["lr"]
    assert stage.optimizer.options["weight_decay"] == row["weight_decay"]
    assert resolved.expect["val/top1"] == pytest.approx(row["top1"] / PERCENT)


def test_novograd_table_2_with_warmup_is_a_variant_in_the_head() -> None:
    (row,) = find_rows("novograd/2", {"optimizer": "novograd", "tricks": ["warmup"]})
    head = load_recipe(NOVOGRAD[32768]).description
    assert f"schedule.warmup_steps={row['warmup_steps']}" in head
    assert f"top-1 {row['top1']}" in head


def test_novograd_table_1_is_in_the_head_of_1k() -> None:
    rows = find_rows("novograd/1", {"optimizer": "novograd"})
    resolved = load_recipe(NOVOGRAD[1024])
    for row in rows:
        assert f"epochs={row['epochs']}\n" in resolved.description + "\n"
        assert f"{row['top1']:.2f}/{row['top5']:.2f}" in resolved.description
        (stage,) = load_recipe(NOVOGRAD[1024], [f"epochs={row['epochs']}"]).stages
        assert stage.optimizer.options["lr"] == row["lr"]
        assert stage.optimizer.options["weight_decay"] == row["weight_decay"]


@pytest.mark.parametrize(("batch", "steps"), [(32768, 3519), (8192, 14076), (1024, 112603)])
def test_novograd_steps(batch: int, steps: int) -> None:
    (stage,) = load_recipe(NOVOGRAD[batch]).stages
    assert stage.steps == steps
