"""micro_batch_size: auto: the search, what is tried, and that a run stays with what it has found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import token_task
import torch
from token_task import TwoMeans, UnevenTokens

from lbzoo.cli.plan import _lines
from lbzoo.engines import fit, micro_batch, micro_batch_sizes
from lbzoo.engines.launch import World
from lbzoo.engines.micro_batch import candidate_sizes, find_micro_batch_sizes, largest_fitting, trial
from lbzoo.errors import LbzooError, UsageError
from lbzoo.recipe import load_recipe, with_micro_batch_sizes
from lbzoo.recipe.annotate import annotate
from lbzoo.recipe.planning import plan_stage

RECIPE = """\
version: 1
seed: 5
task: {name: "token_task:TwoMeans"}
data: {name: "token_task:UnevenTokens", global_batch_size: 24, micro_batch_size: auto}
optimizer: {name: lamb, lr: 0.01}
steps: 3
trainer: {accelerator: cpu, devices: 1}
checkpoint: {every_steps: 1, keep_last: 5}
logging: {every: 1, loggers: []}
"""
CPU = World("cpu", 1, 1)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "auto.yaml"
    path.write_text(RECIPE)
    return path


class Memory:
    """A device on which ``limit`` samples fit, that counts how often it was tried."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried: list[int] = []

    def fits(self, size: int) -> bool:
        self.tried.append(size)
        return size <= self.limit


@pytest.mark.parametrize("candidates", [[1], [1, 2, 3, 4, 6, 8, 12, 24], [7, 14, 49, 98], [2**k for k in range(12)]])
def test_the_search_finds_the_largest_that_fits(candidates: list[int]) -> None:
    for limit in range(candidates[-1] + 2):
        memory = Memory(limit)
        found = largest_fitting(candidates, memory.fits)
        assert found == max((size for size in candidates if size <= limit), default=None)
        assert len(set(memory.tried)) == len(memory.tried)


def test_the_search_never_tries_far_more_than_fits() -> None:
    """A trial that does not fit may take long to fail: at most one beyond twice what fits, and few in all."""
    candidates = [size for size in range(1, 5041) if 5040 % size == 0]
    for limit in (1, 5, 100, 5040):
        memory = Memory(limit)
        assert largest_fitting(candidates, memory.fits) == max(size for size in candidates if size <= limit)
        assert max(memory.tried) <= 3 * limit
        assert len(memory.tried) <= 16


@pytest.mark.parametrize(
    ("ranks", "changes", "expected"),
    [
        (1, [], [1, 2, 3, 4, 6, 8, 12, 24]),
        (2, [], [1, 2, 3, 4, 6, 12]),
        (4, [], [1, 2, 3, 6]),
        (1, ["optimizer.name=vr_lamb"], [1, 2, 3]),  # eight gradients a step, from 24 samples
        (4, ["optimizer.name=vr_lamb"], [1, 2, 3]),
        (1, ["callbacks=[gsnr]"], [1, 2, 3, 4, 6, 8, 12]),
        (4, ["callbacks=[gsnr]"], [1, 2, 3, 6]),
        (1, ["data.num_train=5"], [6, 8, 12, 24]),  # at most 5 shards
    ],
)
def test_what_is_tried(recipe: Path, ranks: int, changes: list[str], expected: list[int]) -> None:
    resolved = load_recipe(recipe, changes)
    assert candidate_sizes(resolved, resolved.stages[0], ranks) == expected


class Devouring(TwoMeans):
    """Runs out of memory on more than five samples at once, somewhere in the forward pass."""

    def sums(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(batch[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().sums(batch)  # type: ignore[arg-type]  # a batch of three tensors


@pytest.fixture
def devouring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_task, "TwoMeans", Devouring)


@pytest.mark.usefixtures("devouring")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_a_trial_trains_and_survives_running_out_of_memory(recipe: Path, precision: str) -> None:
    resolved = load_recipe(recipe, [f"trainer.precision={precision}", "trainer.ema={decay: 0.9}"])
    fits = trial(resolved, resolved.stages[0], UnevenTokens(), CPU)
    assert [fits(size) for size in (4, 6, 1)] == [True, False, True]


def test_an_error_that_is_not_of_memory_comes_out(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(task: TwoMeans, batch: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TwoMeans, "sums", broken)
    resolved = load_recipe(recipe)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trial(resolved, resolved.stages[0], UnevenTokens(), CPU)(1)


def limited_to(limit: int) -> Callable[..., Callable[[int], bool]]:
    return lambda *stage: Memory(limit).fits


def test_not_even_one_sample_fits(recipe: Path) -> None:
    with pytest.raises(LbzooError, match="does not fit into the memory of this device with micro-batches of 1 sample"):
        find_micro_batch_sizes(load_recipe(recipe), {"train": UnevenTokens()}, CPU, limited_to(0))


def test_on_a_cpu_it_has_to_be_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"auto fills a GPU's memory.*data\.micro_batch_size=32"):
        fit(recipe, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_with_fsdp_it_has_to_be_named(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"strategy: fsdp needs all of them together; name it"):
        micro_batch_sizes.check_sizes_can_be_found(load_recipe(recipe, ["trainer.strategy=fsdp"]), World("cuda", 2, 1))


def test_a_run_finds_its_size_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later starts take what the first has found, though another would fit by then; the folder's recipe names it."""
    monkeypatch.setattr(micro_batch_sizes, "check_sizes_can_be_found", lambda *arguments: None)
    monkeypatch.setattr("lbzoo.engines.run.check_sizes_can_be_found", lambda *arguments: None)
    monkeypatch.setattr(micro_batch, "trial", limited_to(7))
    said: list[str] = []
    run = fit(recipe, runs=tmp_path, say=said.append)
    assert run.state == "finished"
    assert "micro_batch_size of stage train: 6 (24 = 6 x 1 devices x 4 accumulated)" in said
    written = load_recipe(run.run_dir / "recipe.yaml")
    assert (written.stages[0].micro_batch_size, written.stages[0].finds_micro_batch_size) == (6, False)
    status = json.loads((run.run_dir / "status.json").read_text())
    assert status["micro_batch_sizes"] == {"train": 6}
    assert status["recipe_hash"] == written.hash == load_recipe(recipe, ["data.micro_batch_size=6"]).hash

    (run.run_dir / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    monkeypatch.setattr(micro_batch, "trial", limited_to(24))
    said.clear()
    again = fit(recipe, runs=tmp_path, resume="auto", say=said.append)
    assert again.run_dir == run.run_dir
    assert not any("trying" in text for text in said)
    assert json.loads((run.run_dir / "status.json").read_text())["micro_batch_sizes"] == {"train": 6}


STAGES = """
stages:
  - {name: short, steps: 2}
  - {name: long, steps: 2, data: {global_batch_size: 12}}
  - {name: named, steps: 2, data: {micro_batch_size: 4}}
"""


def test_each_stage_has_a_size_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(RECIPE.replace("steps: 3\n", "") + STAGES)
    recipe = load_recipe(path)
    assert [stage.finds_micro_batch_size for stage in recipe.stages] == [True, True, False]
    found = with_micro_batch_sizes(recipe, {"short": 8, "long": 6})
    assert [stage.micro_batch_size for stage in found.stages] == [8, 6, 4]
    assert found.hash != recipe.hash
    again = tmp_path / "found.yaml"
    again.write_text(json.dumps(found.document))
    assert load_recipe(again).hash == found.hash
    assert recipe.stages[0].finds_micro_batch_size


def test_a_global_batch_that_the_devices_cannot_share(recipe: Path) -> None:
    with pytest.raises(UsageError, match="global_batch_size 24 is no multiple of"):
        load_recipe(recipe, ["trainer.devices=5"])


def test_plan_and_show_say_that_it_is_found(recipe: Path) -> None:
    resolved = load_recipe(recipe)
    stage = plan_stage(resolved, resolved.stages[0], count_model=False)
    assert (stage.micro_batch_size, stage.shards) == (None, None)
    text = dict(_lines(stage))["batch"]
    assert text == "24 on 1 CPU, in micro-batches of up to 24: found when the run starts (here)"
    assert "micro_batch_size: auto" in "\n".join(map(str, annotate(resolved)))


def test_auto_or_a_number(recipe: Path) -> None:
    with pytest.raises(UsageError, match="micro_batch_size"):
        load_recipe(recipe, ["data.micro_batch_size=automatic"])
