"""The experiment of docs/vrgd_small.md: its arithmetic by brute force, its controls, its runs against the engine."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lbzoo
from lbzoo.checkpoint import load_weights
from lbzoo.data.loader import train_loader
from lbzoo.recipe import build_data, build_schedule, build_task, load_recipe
from lbzoo.tasks.base import Task

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import vrgd_small  # noqa: E402
from vrgd_small_cells import (  # noqa: E402
    BATCHES,
    GRADIENTS,
    OPTIMIZERS,
    RECIPE,
    SEEDS,
    TUNING_SEED,
    VARIANTS,
    Cell,
    Factors,
    Permuted,
    train,
)
from vrgd_small_tables import Interval, Results, report, tuned_lr  # noqa: E402

TWO_STEPS = ["steps=2", "schedule.warmup_steps=1"]


def weights(task: Task) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cell_is_the_recipe_with_overrides(size: int, variant: str) -> None:
    cell = Cell("lars", variant, size, seed=3, base_lr=0.1, lr_factor=0.5)
    recipe = load_recipe(RECIPE, cell.overrides())
    (stage,) = recipe.stages
    assert recipe.seed == 3
    assert stage.global_batch_size == size == GRADIENTS * stage.micro_batch_size
    assert stage.steps == math.ceil(10 * 1437 / size)
    assert stage.optimizer.name == ("vr_lars" if variant in ("vr", "permuted") else "lars")
    assert stage.optimizer.options["lr"] == pytest.approx(0.5 * 0.1 * math.sqrt(size / 64))
    assert stage.optimizer.options.get("gamma") == (0.1 if variant in ("vr", "permuted") else None)


def test_layerwise_adaptation_leaves_out_biases_and_normalisation() -> None:
    (stage,) = load_recipe(RECIPE, Cell("lamb", "base", 64, 0, 0.01).overrides()).stages
    optimizer = lbzoo.create_optimizer(
        build_task(stage), stage.optimizer.name, param_rules=stage.param_rules, **stage.optimizer.options
    )
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert group["adapt"] == (parameter.ndim > 1), name


def brute_force(cell: Cell) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Two steps of (VR-)momentum, each micro-batch's gradient by itself.

    The weights, and of each step the mean of r, and |r g| / |g|.
    """
    recipe = load_recipe(RECIPE, [*cell.overrides(), *TWO_STEPS])
    (stage,) = recipe.stages
    torch.manual_seed(recipe.seed)
    task = build_task(stage).train()
    schedule, data = build_schedule(stage), build_data(stage)
    sizes = {"global_batch_size": stage.global_batch_size, "micro_batch_size": stage.micro_batch_size}
    loader = iter(train_loader(data, **sizes, steps=2, seed=recipe.seed, num_workers=0))
    parameters = list(task.parameters())
    buffers = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    means, kept_lengths = [], []
    for step in (1, 2):
        each = [torch.autograd.grad(task.training_step(next(loader), j), parameters) for j in range(GRADIENTS)]
        ratios, squares, kept_squares = [], 0.0, 0.0
        for parameter, buffer, gradients in zip(parameters, buffers, zip(*each, strict=True), strict=True):
            g = torch.stack(gradients).double()
            mean, variance = g.mean(0), g.var(0, correction=0)
            r = torch.ones_like(mean)
            if cell.is_vr:
                r = mean.square() / variance.clamp(min=1e-6 * mean.square())
                r = (r / r.nanmean()).clamp(0.1, 1.0).nan_to_num(nan=1.0)
            ratios.append(r[mean != 0])
            squares, kept_squares = squares + mean.square().sum(), kept_squares + (r * mean).square().sum()
            buffer.mul_(0.9).add_(r * mean)
            parameter.data.sub_(cell.lr * schedule(step) * buffer)
        means.append(torch.cat(ratios).mean().item())
        kept_lengths.append(math.sqrt(kept_squares / squares))
    return weights(task), means, kept_lengths


@pytest.mark.parametrize("variant", ["base", "vr"])
def test_two_steps_by_brute_force(variant: str) -> None:
    cell = Cell("momentum", variant, 64, seed=1, base_lr=0.05)
    task, measured = train(cell, TWO_STEPS)
    expected, means, kept_lengths = brute_force(cell)
    assert measured["steps"] == 2
    if variant == "vr":
        assert measured["mean_r"] == pytest.approx(sum(means) / 2, rel=1e-3)
        assert measured["kept_length"] == pytest.approx(sum(kept_lengths) / 2, rel=1e-3)
    else:
        assert measured["mean_r"] is measured["kept_length"] is None
    start = build_at_start(cell)
    for name, trained in weights(task).items():
        moved = (expected[name] - start[name]).abs().max()
        assert (trained - expected[name]).abs().max() <= 2e-3 * moved, name


def build_at_start(cell: Cell) -> dict[str, Tensor]:
    torch.manual_seed(cell.seed)
    return weights(build_task(load_recipe(RECIPE, cell.overrides()).stages[0]))


@pytest.mark.parametrize(("optimizer", "variant"), [("momentum", "base"), ("lamb", "vr"), ("lars", "vr")])
def test_the_engine_trains_the_same_weights(optimizer: str, variant: str, tmp_path: Path) -> None:
    cell = Cell(optimizer, variant, 64, seed=2, base_lr=0.02)
    changes = ["steps=3", "schedule.warmup_steps=1"]
    ours, measured = train(cell, changes)
    result = lbzoo.fit(RECIPE, overrides=[*cell.overrides(), *changes], runs=tmp_path)
    theirs = build_task(load_recipe(RECIPE, cell.overrides()).stages[0])
    load_weights(result.run_dir / "checkpoints" / "last", theirs)
    for name, trained in weights(ours).items():
        torch.testing.assert_close(theirs.get_parameter(name), trained, msg=name)
    assert measured["test_accuracy"] == pytest.approx(100 * result.metrics["val/top1"])


# --- The controls -----------------------------------------------------------------------------------------------------


def factors_of_first_step(variant: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Factors] = []
    make = Factors.__init__

    def remember(self: Factors, vr: Any) -> None:
        make(self, vr)
        seen.append(self)

    monkeypatch.setattr(Factors, "__init__", remember)
    train(Cell(optimizer, variant, 64, seed=0, base_lr=0.01), ["steps=1", "schedule.warmup_steps=0"])
    (factors,) = seen
    monkeypatch.undo()
    return factors.last


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_permuted_r_has_the_same_values_in_every_tensor(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = factors_of_first_step("vr", optimizer, monkeypatch)
    permuted = factors_of_first_step("permuted", optimizer, monkeypatch)
    assert len(true) == len(permuted) == 59  # tensors
    # Where no gradient came, r is not to be seen; that is so in few tensors (behind a dead channel).
    seen = [pair for pair in zip(true, permuted, strict=True) if all(factors.isfinite().all() for factors in pair)]
    assert len(seen) > 50
    for one, other in seen:
        torch.testing.assert_close(one.sort().values, other.sort().values, rtol=1e-5, atol=0)
        assert one.numel() < 16 or (one != other).float().mean() > 0.1
        assert one.min() >= 0.1 - 1e-6
        assert one.max() <= 1 + 1e-6


class ConstantStatistics:
    """The same GSNR at every step, as if measured."""

    num_gradients = 8

    def __init__(self, gsnr: Tensor) -> None:
        self.gsnr, self.resets = gsnr, 0

    def require(self, parameters: Any) -> int:
        return self.num_gradients

    def take_gsnr(self, parameter: Tensor) -> Tensor:
        return self.gsnr.clone(memory_format=torch.preserve_format)

    def reset(self) -> None:
        self.resets += 1


def test_one_permutation_for_the_whole_run() -> None:
    gsnr = torch.arange(6 * 4 * 9.0).view(6, 4, 3, 3).to(memory_format=torch.channels_last)
    permuted = Permuted(ConstantStatistics(gsnr), seed=1)
    parameter = torch.zeros_like(gsnr)
    first, second = permuted.take_gsnr(parameter), permuted.take_gsnr(parameter)
    assert torch.equal(first, second)
    assert not torch.equal(first, gsnr)
    assert torch.equal(first.flatten().sort().values, gsnr.flatten())
    assert first.stride() == gsnr.stride()
    assert not torch.equal(first, Permuted(ConstantStatistics(gsnr), seed=2).take_gsnr(parameter))


def test_gamma_one_is_the_base_optimizer_with_mean_r_one() -> None:
    base, _ = train(Cell("momentum", "base", 64, seed=0, base_lr=0.05), TWO_STEPS)
    vr, measured = train(Cell("momentum", "vr", 64, seed=0, base_lr=0.05), [*TWO_STEPS, "optimizer.gamma=1.0"])
    assert measured["mean_r"] == 1.0
    for name, trained in weights(vr).items():
        torch.testing.assert_close(trained, weights(base)[name], msg=name)


# --- All runs, and the tables -----------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that were asked for; they train nothing."""
    cells: list[Cell] = []

    def pretend(cell: Cell) -> tuple[None, dict[str, Any]]:
        cells.append(cell)
        accuracy = 90 + cell.seed + (2.0 + 0.1 * cell.seed if cell.variant == "vr" else 0.0)
        measured = {"steps": 5, "lr": cell.lr, "train_accuracy": accuracy + 1, "train_loss": 0.1, "cpu_seconds": 60.0}
        measured |= {"test_accuracy": accuracy, "test_loss": abs(math.log2(cell.base_lr / 0.05))}
        return None, {**measured, "mean_r": 0.25 + cell.seed if cell.is_vr else None}

    monkeypatch.setattr(vrgd_small, "train", pretend)
    return cells


def test_lower_lr_is_that_of_the_measured_mean(trained: list[Cell], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert vrgd_small.run_block("adam", 256, 3, 0.01, {}, rows) == 4
    assert [cell.variant for cell in trained] == list(VARIANTS)
    factors = {cell.variant: cell.lr_factor for cell in trained}
    assert factors == {"base": 1.0, "vr": 1.0, "permuted": 1.0, "lower_lr": 3.25}
    assert trained[2].lr == pytest.approx(3.25 * 0.01 * 2)


def test_goes_on_at_the_run(trained: list[Cell], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    vrgd_small.run_block("adam", 256, 3, 0.01, {}, file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    vrgd_small.drop_unfinished_line(file)
    rows = vrgd_small.read_rows(file)
    assert [row["variant"] for row in rows] == ["base", "vr"]
    trained.clear()
    vrgd_small.run_block("adam", 256, 3, 0.01, {row["variant"]: row for row in rows}, file)
    assert [cell.variant for cell in trained] == ["lower_lr", "permuted"]
    assert [row["variant"] for row in vrgd_small.read_rows(file)] == list(VARIANTS)


def test_tuning_goes_beyond_the_grid_while_the_best_is_at_its_end() -> None:
    def rows(losses: dict[float, float]) -> list[dict[str, Any]]:
        return [
            {"optimizer": name, "seed": TUNING_SEED, "base_lr": lr, "test_loss": losses.get(lr, 1.0)}
            for name, optimizer in OPTIMIZERS.items()
            for lr in [*optimizer.learning_rates, *losses]
        ]

    assert len(vrgd_small.tuning_cells([])) == sum(len(each.learning_rates) for each in OPTIMIZERS.values())
    inner = rows({0.02: 0.5, 0.03: 0.9})
    assert vrgd_small.tuning_cells(inner) == []
    assert tuned_lr("adam", inner) == 0.02
    assert {cell.base_lr for cell in vrgd_small.tuning_cells(rows({0.8: 0.5}))} == {1.6}
    assert {cell.base_lr for cell in vrgd_small.tuning_cells(rows({0.001: 0.5}))} == {0.0005}
    assert all(cell.seed not in SEEDS and cell.variant == "base" for cell in vrgd_small.tuning_cells([]))


def test_intervals_against_a_table_of_student() -> None:
    interval = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half_width == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert interval.excludes_zero
    assert str(interval) == "+3.00 ± 1.96 *"
    assert str(Interval.of([-1.0, 0.0, 1.0])) == "+0.00 ± 2.48"
    assert str(Interval.of([1.0, 2.0])) == "", "two say nothing"
    assert str(Interval.of([-0.001] * 5)) == "+0.00 ± 0.00", "nor does a difference of one image, each time"


def test_comparisons_are_paired_by_seed(trained: list[Cell], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for seed in (0, 1, 2):
        vrgd_small.run_block("adam", 256, seed, 0.01, {}, file)
    rows = vrgd_small.read_rows(file)
    results = Results([row for row in rows if (row["variant"], row["seed"]) != ("base", 1)])
    assert results.differences("test_accuracy", "adam", 256, "vr", "base") == pytest.approx([2.0, 2.2])
    assert results.values("gap", "adam", 256, "vr") == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})


def test_the_report_says_what_was_run(trained: list[Cell], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for cell in vrgd_small.tuning_cells([]):
        vrgd_small.run_cell(cell, file)
    tuned = {name: tuned_lr(name, vrgd_small.read_rows(file)) for name in OPTIMIZERS}
    for seed, size, name in itertools.product(SEEDS, BATCHES, OPTIMIZERS):
        vrgd_small.run_block(name, size, seed, tuned[name], {}, file)
    rows = vrgd_small.read_rows(file)
    assert len(rows) == 24 + 4 * 4 * 4 * 5
    text = report(rows, file.name)
    assert "| momentum | 256 | 5 | 5 | 92.00 ± 1.58 | 94.20 ± 1.74 | 92.00 ± 1.58 | 92.00 ± 1.58 | 2.25 |" in text
    assert "| momentum | 256 | +2.20 ± 0.20 * | +2.20 ± 0.20 * | +2.20 ± 0.20 * | +0.00 ± 0.00 | +0.00 ± 0.00 |" in text
    assert "48 of 80 intervals exclude zero; where nothing differs, about 4 would." in text
    assert "| lars | 8192 | 12.21 | 91.86 | +79.65 | 1408 | +2.20 ± 0.20 * |" in text  # the paper's table 5
    assert "| momentum | 0.05 | 0.0125: 2.000, 0.025: 1.000, 0.05: 0.000" in text


def test_rows_are_json(trained: list[Cell], tmp_path: Path) -> None:
    row = vrgd_small.run_cell(Cell("adam", "base", 64, 0, 0.01), tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row
    assert row["commit"] is None or len(row["commit"]) >= 40


def test_the_page_holds_the_tables_of_a_result() -> None:
    page = (ROOT / "docs" / "vrgd_small.md").read_text(encoding="utf-8")
    (link,) = set(re.findall(r"benchmarks/results/(vrgd_small_\w[\w-]*)\.md", page))
    results = ROOT / "benchmarks" / "results"
    lines = (results / f"{link}.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert [row for row in rows if row not in lines] == []
    runs = vrgd_small.read_rows(results / f"{link}.jsonl")
    tables = [line for line in report(runs, f"{link}.jsonl").splitlines() if line.startswith("| ")]
    assert tables == [line for line in lines if line.startswith("| ")]
