"""Every row of every table resolves to a sound recipe with the paper's values, or says why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lbzoo import registry
from lbzoo.papers import find_table
from lbzoo.recipe import Stage, build_schedule
from lbzoo.recipe.finding import PACKAGE_RECIPES
from lbzoo.tables.paper_tables import paper_table, table_ids
from lbzoo.tables.row_recipes import RowRecipe, Unavailable, missing_parts, recipe_of
from lbzoo.tables.table_files import Needs, table_files

SAMPLES = {"imagenet-2012": 1_281_167, "cifar10": 50_000, "mnist": 60_000}
# VRGD quotes LANS at sizes that the LANS paper has not (contradiction vrgd/c2); what is run is what LANS reports.
CORRECTED = {("vrgd/1", "lans"): {"batch_size": {"phase1": 98304, "phase2": 33792}, "steps": 4301}}
OPTIMIZERS = {"sgd": {"momentum", "lars"}}  # NovoGrad's SGD has momentum, and You et al.'s is LARS
RECIPES = {table_id: [recipe_of(row) for row in paper_table(table_id).rows] for table_id in table_ids()}
BUILT = [table_id for table_id, rows in RECIPES.items() if any(isinstance(row, RowRecipe) for row in rows)]


@pytest.mark.parametrize("table_id", BUILT)
def test_the_recipe_has_the_values_of_the_row(table_id: str) -> None:
    """Read from the paper's data here, apart from the code that put them into the recipe."""
    table = find_table(table_id)
    for recipe, printed in zip(RECIPES[table_id], table["rows"], strict=True):
        if isinstance(recipe, RowRecipe):
            row = {**best_run(printed), **table["fixed"], **printed}
            row |= {"samples": SAMPLES.get(table["dataset"]), **CORRECTED.get((table_id, row["optimizer"]), {})}
            where = f"{table_id} row {recipe.row.number}"
            stages = recipe.load().stages
            if len(stages) == 1:
                assert_same(stages[0], row, where)
            else:
                assert_same_phases(stages, row, where)


def best_run(row: dict[str, Any]) -> dict[str, Any]:
    tables = [find_table(each) for each in row.get("best_of", ())]
    runs = [{**table["fixed"], **run} for table in tables for run in table["rows"]]
    return max(runs, key=lambda run: run["top1"]) if runs else {}


def assert_same(stage: Stage, row: dict[str, Any], where: str) -> None:
    options, schedule = stage.optimizer.options, build_schedule(stage)
    optimizer = row["optimizer"].replace("-", "_")
    assert stage.optimizer.name in OPTIMIZERS.get(optimizer, {optimizer}), where
    assert stage.global_batch_size == row["batch_size"], where
    lr = row.get("lr_recommended", row.get("lr"))
    assert lr is None or options["lr"] == pytest.approx(lr, rel=1e-11), where
    if row.get("weight_decay") is not None:
        assert options["weight_decay"] == row["weight_decay"], where
    if "l2_regularization" in row:
        assert stage.task.options.get("l2_regularization", 0.0) == row["l2_regularization"], where
    if isinstance(row.get("epochs"), int):
        assert stage.epochs == row["epochs"], where
        assert stage.steps == -(-row["epochs"] * row["samples"] // row["batch_size"]), where
    if "steps" in row:
        assert stage.steps == row["steps"], where
    if "warmup_epochs" in row:
        assert stage.schedule.warmup_epochs == pytest.approx(row["warmup_epochs"]), where
        steps = row["warmup_epochs"] * row["samples"] / row["batch_size"]
        assert schedule.warmup_steps == pytest.approx(steps, abs=0.5), where
    elif "warmup_steps" in row:
        assert schedule.warmup_steps == row["warmup_steps"], where
    elif row.get("warmup") == "none" or row.get("lr_scheme") == "none":
        assert schedule.warmup_steps == 0, where
    if "decay_epochs" in row:
        boundaries = [round(epoch * row["samples"] / row["batch_size"]) for epoch in row["decay_epochs"]]
        for boundary in boundaries:
            assert schedule(boundary + 1) == pytest.approx(row["decay_factor"] * schedule(boundary)), where


def assert_same_phases(stages: Sequence[Stage], row: dict[str, Any], where: str) -> None:
    """A run of two phases and a fine-tuning: batch sizes and steps of the phases, or of the one that the row is of."""
    phases = [stages[row["stage"] - 1]] if "stage" in row else stages[:2]
    batch = row["batch_size"]
    sizes = list(batch.values()) if isinstance(batch, dict) else [batch] * len(phases)
    assert [stage.global_batch_size for stage in phases] == sizes, where
    assert "steps" not in row or sum(stage.steps for stage in phases) == row["steps"], where
    if isinstance(row.get("lr"), float):
        assert phases[0].optimizer.options["lr"] == pytest.approx(row["lr"], rel=1e-11), where


@pytest.mark.parametrize("table_id", BUILT)
def test_sound_at_every_scale_and_of_its_own_row(table_id: str) -> None:
    for recipe in RECIPES[table_id]:
        if not isinstance(recipe, RowRecipe):
            continue
        paper, mini = recipe.load("paper"), recipe.load("mini")
        recipe.load("smoke")
        assert paper.table is not None
        assert (paper.table.id, paper.table.row) == (table_id, dict(recipe.row.key))
        printed = [
            each.value / (1 if each.metric.unit == "fraction" else 100)
            for each in recipe.row.reported
            if each.value is not None and each.metric.name != "time_minutes"
        ]
        assert list(paper.expect.values()) == pytest.approx(printed)
        assert mini.table is None, "mini is no row of the paper's"
        if "optimizer" not in table_files()[table_id].columns:  # one recipe for them all drops what they do not take
            assert not paper.notes, f"{table_id} row {recipe.row.number}: {paper.notes}"


def test_rows_of_a_grid_stay_apart_at_scale_mini() -> None:
    """A mini: block that set the learning rate would make one run of a whole tuning table."""
    for table_id in BUILT:
        rows = [recipe for recipe in RECIPES[table_id] if isinstance(recipe, RowRecipe)]
        hashes = {recipe.load("mini").hash for recipe in rows}
        distinct = {recipe.load("paper").hash for recipe in rows}
        assert len(hashes) == len(distinct), table_id


def test_what_is_missing_is_named_and_nothing_else() -> None:
    """The list shrinks by itself: a reason names only what is not registered, or not written."""
    for table_id, recipes in RECIPES.items():
        for recipe in recipes:
            if not isinstance(recipe, Unavailable) or recipe.kind == "not in the zoo":
                continue
            needs = table_files()[table_id].needs
            for names, known in (
                (needs.tasks, registry.tasks),
                (needs.data, registry.data),
                (needs.models, registry.models),
            ):
                for name in names:
                    assert (name in known) != (name in recipe.reason.split("recipe ")[0]), (table_id, name)
            assert recipe.name is not None
            assert ("recipe " in recipe.reason) != (PACKAGE_RECIPES / f"{recipe.name}.yaml").is_file()


def test_a_registered_component_is_not_missing() -> None:
    needs = Needs(
        tasks=["image_classification", "no_such_task"], data=["digits"], models=["cifar_resnet20", "no_model"]
    )
    assert missing_parts([needs, needs]) == ["task no_such_task", "model no_model"]


def test_every_imagenet_row_can_be_run() -> None:
    for table_id in table_ids():
        if find_table(table_id)["dataset"] == "imagenet-2012":
            kinds = {recipe.kind for recipe in RECIPES[table_id] if isinstance(recipe, Unavailable)}
            assert kinds <= {"not in the zoo"}, table_id


def test_what_the_zoo_has_not() -> None:
    absent = {
        (table_id, recipe.row.settings["optimizer"], recipe.row.settings.get("reference"))
        for table_id, recipes in RECIPES.items()
        for recipe in recipes
        if isinstance(recipe, Unavailable) and recipe.kind == "not in the zoo"
    }
    assert absent == {
        ("vrgd/1", "adasum", None),
        ("vrgd/2", "decentlam", None),
        ("novograd/2", "sgd", "Codreanu et al. 2017"),
    }


def test_a_written_row_is_the_same_recipe(tmp_path: Any) -> None:
    from lbzoo.recipe import load_recipe

    for table_id in ("lamb/3", "novograd/2"):
        for recipe in RECIPES[table_id]:
            if isinstance(recipe, RowRecipe):
                path = recipe.write(tmp_path)
                for scale in ("paper", "mini", "smoke"):
                    assert load_recipe(path, scale=scale).hash == recipe.load(scale).hash  # type: ignore[arg-type]
                    assert load_recipe(path).name == recipe.stem
