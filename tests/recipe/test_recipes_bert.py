"""The BERT recipes: the papers' sums, and one learning rate over two phases."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from lbzoo.cli import app
from lbzoo.papers import find_rows
from lbzoo.recipe import Stage, build_schedule, load_recipe
from lbzoo.recipe.finding import PACKAGE_RECIPES

BERT = sorted(path.stem for path in PACKAGE_RECIPES.glob("bert_*.yaml"))
LAMB_STEPS, LAMB_PHASE_1, LAMB_WARMUP = 15625, 14063, 3125


def rate(stage: Stage, t: int) -> float:
    return float(stage.optimizer.options["lr"]) * build_schedule(stage)(t)


def test_plan_of_lans_is_the_papers_arithmetic() -> None:
    printed = CliRunner().invoke(app, ["plan", "recipes/bert_lans_96k.yaml", "--no-model", "--json"])
    assert printed.exit_code == 0, printed.output
    stages = {stage["name"]: stage for stage in json.loads(printed.stdout)["stages"]}
    for name, row in zip(("seq128", "seq512"), find_rows("lans/1", {}), strict=True):
        stage = stages[name]
        assert stage["steps"] == row["steps"]
        assert stage["global_batch_size"] == row["batch_size"]
        assert (stage["warmup_steps"], stage["constant_steps"]) == (
            row["derived"]["warmup_steps"],
            row["derived"]["const_steps"],
        )
        assert stage["lr"] == row["lr"]
        assert stage["shards"]["count"] == 1536
        paper = stage["batches"][0]
        assert (paper["devices"] * paper["num_nodes"], paper["accumulation"]) == (1536, 1)
    assert [stages[name]["micro_batch_size"] for name in ("seq128", "seq512")] == [64, 22]
    assert (stages["seq128"]["steps"], stages["seq512"]["steps"]) == (3519, 782)
    assert (stages["seq128"]["warmup_steps"], stages["seq512"]["warmup_steps"]) == (1501, 150)


def test_the_model_of_the_plan_is_bert_large() -> None:
    from lbzoo.recipe.dry_run import dry_run

    pretraining, _, squad = load_recipe("bert_lans_96k").stages
    assert dry_run(pretraining).parameters == 336_232_258  # the vocabulary padded to 30528
    assert dry_run(squad).parameters == 334_100_482


@pytest.mark.parametrize("name", [name for name in BERT if "mlperf" not in name])
def test_three_stages(name: str) -> None:
    for scale in ("paper", "mini", "smoke"):
        stages = load_recipe(name, scale=scale).stages  # type: ignore[arg-type]
        assert [stage.name for stage in stages] == ["seq128", "seq512", "squad"]
        assert [stage.task.name for stage in stages] == ["bert_pretraining", "bert_pretraining", "squad"]
        assert stages[0].data.options["seq_len"] < stages[1].data.options["seq_len"]


def test_lamb_has_one_decay_through_both_phases() -> None:
    first, second, _ = load_recipe("bert_lamb").stages
    assert (first.steps, first.steps + second.steps) == (LAMB_PHASE_1, LAMB_STEPS)
    for t in (1, 1000, LAMB_WARMUP, LAMB_WARMUP + 1, 9000, LAMB_PHASE_1, LAMB_PHASE_1 + 1, 15000, LAMB_STEPS):
        whole = min(t / LAMB_WARMUP, (LAMB_STEPS - t) / (LAMB_STEPS - LAMB_WARMUP))
        here = rate(first, t) if t <= LAMB_PHASE_1 else rate(second, t - LAMB_PHASE_1)
        assert here == pytest.approx(0.005 * whole, abs=1e-9), t


@pytest.mark.parametrize("name", ["bert_lamb", "bert_lars", "bert_adamw"])
def test_a_single_batch_size_has_a_single_decay(name: str) -> None:
    """From the peak in a straight line to 0, without a bend where the second phase begins."""
    first, second, _ = load_recipe(name).stages
    assert first.global_batch_size == second.global_batch_size
    peak, warmup = rate(first, LAMB_WARMUP), LAMB_WARMUP
    steps = first.steps + second.steps
    for t in (warmup + 1, first.steps // 2, first.steps, first.steps + 1, first.steps + second.steps // 2, steps):
        here = rate(first, t) if t <= first.steps else rate(second, t - first.steps)
        assert here == pytest.approx(peak * (steps - t) / (steps - warmup), abs=1e-6 * peak), t


def test_mixed_batches_warm_up_again() -> None:
    first, second, _ = load_recipe("bert_lamb_64k").stages
    assert (first.steps + second.steps, first.global_batch_size, second.global_batch_size) == (8599, 65536, 32768)
    assert rate(first, first.steps) == 0
    assert (build_schedule(first).warmup_steps, build_schedule(second).warmup_steps) == (2001, 200)
    assert rate(second, 200) == 0.004


def test_nvidias_decay_has_the_power_of_a_half() -> None:
    first, _, _ = load_recipe("bert_lamb_64k_nvidia").stages
    assert rate(first, 5000) == pytest.approx(0.006 * math.sqrt(1 - 5000 / 7038))


def test_adamw_is_the_best_row_of_table_8() -> None:
    first, second, _ = load_recipe("bert_adamw").stages
    (row,) = find_rows("lamb/8", {"warmup_ratio": 0.10, "lr": 0.0002})
    assert first.steps + second.steps == 31250
    assert build_schedule(first).warmup_steps == row["warmup_steps"]
    assert rate(first, 3125) == row["lr"]
    assert rate(first, 28125) == pytest.approx(rate(second, 1), rel=1e-3)


def test_mlperfs_reference_point() -> None:
    (stage,) = load_recipe("bert_lamb_mlperf").stages
    assert (stage.global_batch_size, stage.steps, stage.data.options["seq_len"]) == (4096, 855, 512)
    assert stage.optimizer.options["betas"] == (0.66, 0.998)
    assert rate(stage, 1) == pytest.approx(0.0024, rel=2e-3)
