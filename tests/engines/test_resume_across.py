"""A run that one engine and layout began, another one ends: the uninterrupted run's weights, each log line once."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights, validate_here

from lbzoo.engines import RunResult
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.engines.run_folder import RunFolder

# Twelve micro-batches a step divide among 1, 2, 3 and 4 ranks; the averages' state takes part in what is compared.
RECIPE = """\
version: 1
seed: 3
task: {name: "parity_tasks:LayerNormNet"}
data: {name: "parity_tasks:Vectors", global_batch_size: 24, micro_batch_size: 2}
optimizer: {name: vr_lamb, lr: 0.02, weight_decay: 0.01}
schedule: {name: cosine, warmup_steps: 2}
trainer: {accelerator: cpu, gradient_clip_norm: 0.5, validate_every: {steps: 4}}
checkpoint: {every_steps: 4, keep_last: 10}
logging: {every: 1, loggers: []}
callbacks: [trust_ratio, gsnr]
stages:
  - {name: first, steps: 4}
  - {name: second, steps: 8, optimizer: {name: novograd}}
"""
FSDP, HSDP = ("trainer.strategy=fsdp",), ("trainer.strategy=fsdp", "trainer.fsdp.shard_size=2")
ACCELERATE = ("trainer.engine=accelerate",)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "lightning x 1": (1, ()),
    "accelerate, fsdp x 4": (4, (*ACCELERATE, *FSDP)),
    "lightning, hsdp x 4": (4, HSDP),
    "accelerate, ddp x 2": (2, ACCELERATE),
    "lightning, fsdp x 3": (3, FSDP),
    "accelerate x 1": (1, ACCELERATE),
    "lightning, ddp x 4": (4, ()),
    "accelerate, hsdp x 4": (4, (*ACCELERATE, *HSDP)),
    "lightning, fsdp x 2": (2, FSDP),
}
NAMES = list(LAYOUTS)
# Steps 4 and 8 are the border between the stages and the middle of the second.
IN_A_RING = [(before, after, 8) for before, after in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True)]
THE_REST = [(a, b, step) for a in NAMES for b in NAMES for step in (4, 8) if (a, b, step) not in IN_A_RING]


def run_on(layout: str, recipe: Path, runs: Path, resume: Path | None = None) -> RunResult:
    ranks, overrides = LAYOUTS[layout]
    return on_ranks(ranks, partial(fit_here, resume=resume), recipe, list(overrides), runs)[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "across.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of every layout, filled as they are needed."""
    return {"": tmp_path_factory.mktemp("runs")}


def whole_run(layout: str, recipe: Path, runs: dict[str, Path]) -> Path:
    if layout not in runs:
        runs[layout] = run_on(layout, recipe, runs[""] / layout).run_dir
    return runs[layout]


def cut_after(run: Path, step: int, folder: Path) -> Path:
    """The run as if it had died after ``step``."""
    copy = folder / "across" / "1"
    shutil.copytree(run, copy, symlinks=True)
    for path in copy.glob("checkpoints/step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (copy / "status.json").write_text(json.dumps({**RunFolder(copy).status(), "state": "failed"}))
    return copy


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after", "step"),
    [*IN_A_RING, (NAMES[4], NAMES[1], 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in THE_REST)],
)
def test_begun_on_one_and_ended_on_another(
    recipe: Path, runs: dict[str, Path], tmp_path: Path, before: str, after: str, step: int
) -> None:
    cut = cut_after(whole_run(before, recipe, runs), step, tmp_path)
    result = run_on(after, recipe, tmp_path, resume=cut)
    assert (result.state, result.step, result.run_dir) == ("finished", 12, cut)
    expected, found = saved_weights(whole_run(NAMES[0], recipe, runs)), saved_weights(cut)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert [line["step"] for line in read_metrics(cut / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.dist
def test_validated_by_any_layout(recipe: Path, runs: dict[str, Path]) -> None:
    run = whole_run("lightning, fsdp x 3", recipe, runs)
    logged = RunFolder(run).status()["metrics"]
    for ranks, overrides in LAYOUTS.values():
        words = ["trainer.engine=lightning", "trainer.strategy=auto", *overrides]
        found = on_ranks(ranks, validate_here, run, words)
        assert found[0] == pytest.approx(logged, rel=1e-5)


@pytest.mark.dist
def test_weights_of_a_sharded_run_begin_another(recipe: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """With a learning rate of 0 it ends with them."""
    still = ["stages.first.steps=2", "stages.second.steps=2", "optimizer.lr=0"]
    run = whole_run("lightning, fsdp x 3", recipe, runs)
    for ranks, overrides in (LAYOUTS["lightning, fsdp x 2"], LAYOUTS["lightning x 1"]):
        words = [*still, *overrides]
        result = on_ranks(ranks, partial(fit_here, init_from=run / "checkpoints" / "last"), recipe, words, tmp_path)[0]
        expected, found = saved_weights(run), saved_weights(result.run_dir)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
