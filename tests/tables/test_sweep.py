"""Sweeps: every point once, n at a time, resumed after failures, signals and kills; the tables' grids."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbzoo.errors import UsageError
from lbzoo.papers import find_rows
from lbzoo.recipe import load_recipe
from lbzoo.recipe.finding import PACKAGE_RECIPES
from lbzoo.tables import sweep as sweep_module
from lbzoo.tables.paper_tables import paper_table
from lbzoo.tables.row_recipes import RowRecipe, Unavailable, recipe_of
from lbzoo.tables.sweep import Sweep, SweepResult, plan_sweep, run_sweep
from lbzoo.tables.sweep_report import summary, summary_data, write_summary
from lbzoo.tables.table_grids import grid_columns, grid_of

RECIPE = PACKAGE_RECIPES / "resnet50_adamw.yaml"
WORDS = ["optimizer.lr=1e-4,1e-3,1e-2"]
IMAGENET_TUNING = [f"lamb/{number}" for number in range(9, 26)]

# Stands for `lbzoo fit`: it logs -|log10(lr) + 3|, or does as the learning rate tells it.
TRIAL = """
    import json, math, os, pathlib, signal, sys, time
    folder, *words = sys.argv[1:]
    given = dict(word.split("=", 1) for word in words)
    run = pathlib.Path(folder) / "recipe" / "1"
    resumed = run.is_dir()
    run.mkdir(parents=True, exist_ok=True)
    def leave(state, code, **values):
        (run / "status.json").write_text(json.dumps({"state": state, **values}))
        raise SystemExit(code)
    signal.signal(signal.SIGTERM, lambda *_: leave("interrupted", 143))
    with open(os.environ["SWEEP_LOG"], "a") as log:
        log.write(f"{time.time()} {' '.join(words)} resumed={resumed} {os.environ.get('OMP_NUM_THREADS')}\\n")
    lr = float(given["optimizer.lr"])
    if os.environ.get("SWEEP_HANGS") == given["optimizer.lr"]:
        time.sleep(60)
    if os.environ.get("SWEEP_FAILS") == given["optimizer.lr"]:
        print("error: the data is missing")
        raise SystemExit(1)
    if lr > 1:
        leave("diverged", 3, error="the loss is NaN")
    leave("finished", 0, metrics={"val/top1": -abs(math.log10(lr) + 3)})
"""


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Every trial is the script above; the fixture gives what they logged."""
    script, log = tmp_path / "trial.py", tmp_path / "log.txt"
    script.write_text(textwrap.dedent(TRIAL))
    log.touch()
    monkeypatch.setenv("SWEEP_LOG", str(log))
    monkeypatch.setattr(
        sweep_module,
        "fit_command",
        lambda sweep, overrides, folder: [sys.executable, str(script), str(folder), *overrides],
    )
    return lambda: log.read_text().splitlines()


def planned(tmp_path: Path, words: list[str], **options: Any) -> Sweep:
    return plan_sweep(RECIPE, words, runs=tmp_path, scale="mini", **options)


def values(result: SweepResult) -> dict[str, float | None]:
    return {trial.values["optimizer.lr"]: trial.value for trial in result.trials}


def test_a_grid_and_its_summary(tmp_path: Path, trials: Callable[[], list[str]]) -> None:
    said: list[str] = []
    result = run_sweep(planned(tmp_path, WORDS), say=said.append)
    assert values(result) == pytest.approx({"1e-4": -1.0, "1e-3": 0.0, "1e-2": -1.0})
    columns, rows = summary(result)
    assert columns == ["#", "optimizer.lr", "val/top1", "seconds", "run"]
    assert [row[:2] for row in rows] == [["1", "1e-3"], ["2", "1e-4"], ["3", "1e-2"]]
    assert said[0].endswith("0 of 3 trials done")
    written = write_summary(result)
    assert [path.name for path in written] == ["summary.csv", "summary.png"]
    with written[0].open() as file:
        assert [row["optimizer.lr"] for row in csv.DictReader(file)][:1] == ["1e-3"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert summary_data(result)["trials"][0]["values"] == {"optimizer.lr": "1e-3"}


def test_the_same_command_goes_on_and_more_trials_extend(tmp_path: Path, trials: Callable[[], list[str]]) -> None:
    words = ["optimizer.lr=log(1e-4,1e-1)"]
    first = run_sweep(planned(tmp_path, words, trials=2))
    assert len(trials()) == 2
    again = run_sweep(planned(tmp_path, words, trials=2))
    assert (len(trials()), values(again)) == (2, values(first)), "nothing is run twice"
    more = run_sweep(planned(tmp_path, words, trials=4))
    assert len(trials()) == 4
    assert values(first).items() <= values(more).items()


def test_a_part_of_a_grid_and_the_whole_of_it_do_not_share_results(
    tmp_path: Path, trials: Callable[[], list[str]]
) -> None:
    """Their points stand in different orders: a result would be that of another learning rate."""
    words = ["optimizer.lr=1e-5,1e-4,1e-3,1e-2,1e-1"]
    for number in (2, 3, 5, None):
        result = run_sweep(planned(tmp_path, words, trials=number))
        assert len(result.trials) == (number or 5)
        assert values(result) == pytest.approx({lr: -abs(math.log10(float(lr)) + 3) for lr in values(result)})
    assert len(trials()) == 3 + 5, "a larger part extends a smaller one"
    planned(tmp_path, words, trials=2, name="mine")
    with pytest.raises(UsageError, match=r"holds another sweep .* one of the two takes a grid in part"):
        planned(tmp_path, words, name="mine")


def test_a_failed_trial_is_tried_again_and_a_diverged_one_not(
    tmp_path: Path, trials: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_FAILS", "1e-3")
    sweep = planned(tmp_path, ["optimizer.lr=1e-3,1e-2,10"])
    result = run_sweep(sweep)
    endings = {trial.values["optimizer.lr"]: (trial.ending, trial.error) for trial in result.trials}
    assert endings == {
        "1e-3": ("failed", "error: the data is missing"),
        "1e-2": ("finished", None),
        "10": ("diverged", "the loss is NaN"),
    }
    assert result.failed == 1
    assert [row[2] for row in summary(result)[1]] == ["-1", "failed", "diverged"]
    monkeypatch.delenv("SWEEP_FAILS")
    assert run_sweep(sweep).failed == 0
    assert [line.split()[1] for line in trials()].count("optimizer.lr=1e-3") == 2
    assert len(trials()) == 4


def test_optimizers_at_equal_budgets(tmp_path: Path, trials: Callable[[], list[str]]) -> None:
    words = ["optimizer.name=adamw,lamb", "optimizer.lr=log(1e-4,1e-2)"]
    result = run_sweep(planned(tmp_path, words, trials=2))
    by_arm = {arm: [trial.values for trial in result.trials if trial.arm == arm] for arm in ("adamw", "lamb")}
    assert by_arm["adamw"] == by_arm["lamb"]
    assert len(by_arm["lamb"]) == 2
    assert [line.split()[1] for line in trials()] == ["optimizer.name=adamw", "optimizer.name=lamb"] * 2
    assert summary(result)[0][:2] == ["#", "optimizer"]
    write_summary(result)


def test_budgets_that_would_differ_are_refused(tmp_path: Path) -> None:
    words = ["optimizer.name=adamw,lamb", "optimizer.lr=1e-4,1e-3", "lamb:optimizer.lr=1e-3,1e-2,1e-1"]
    with pytest.raises(UsageError, match="grids differ in size"):
        planned(tmp_path, words)
    with pytest.raises(UsageError, match="budgets would differ"):
        planned(tmp_path, words, trials=3)
    assert len(planned(tmp_path, words, trials=2).points[1]) == 2


def test_n_at_a_time(tmp_path: Path, trials: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SWEEP_HANGS", "1e-4")
    result: list[SweepResult] = []
    sweep = planned(tmp_path, WORDS)

    def stop() -> None:
        """While the first trial hangs, the others run beside it."""
        for _ in range(200):
            if len(trials()) == 3:
                break
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    result.append(run_sweep(sweep, jobs=2))
    assert result[0].interrupted
    endings = {trial.values["optimizer.lr"]: trial.ending for trial in result[0].trials}
    assert endings == {"1e-4": "interrupted", "1e-3": "finished", "1e-2": "finished"}
    assert {line.split()[-1] for line in trials()} == {str(max((os.cpu_count() or 1) // 2, 1))}
    monkeypatch.delenv("SWEEP_HANGS")
    assert not run_sweep(sweep).interrupted
    assert "resumed=True" in trials()[-1]
    assert len(trials()) == 4, "only the trial that was cut short is run again"


def test_a_killed_sweep_goes_on(tmp_path: Path, trials: Callable[[], list[str]]) -> None:
    """A trial that was running when its process died counts as not done."""
    from lbzoo.tables.sweep_study import ArmStudy

    sweep = planned(tmp_path, WORDS)
    study = ArmStudy(sweep.folder, sweep.arms[0], sweep.points[0], "max")
    study.begin(0)
    assert len(values(run_sweep(sweep))) == 3
    assert len(trials()) == 3


def test_two_processes_do_not_share_a_sweep(tmp_path: Path, trials: Callable[[], list[str]]) -> None:
    sweep = planned(tmp_path, WORDS)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(sweep.folder / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(UsageError, match="running already"):
            run_sweep(sweep)
    finally:
        holder.kill()
        holder.wait()


def test_mistakes_are_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no option 'weight_decy'; did you mean 'weight_decay'"):
        planned(tmp_path, ["optimizer.weight_decy=1,2"])
    with pytest.raises(UsageError, match="must be"):
        planned(tmp_path, ["optimizer.lr=1e-3,-1"])
    with pytest.raises(UsageError, match="--mode max or --mode min"):
        planned(tmp_path, WORDS, metric="train/loss")
    assert planned(tmp_path, WORDS, metric="val/loss", mode="min").mode == "min"
    planned(tmp_path, WORDS, name="mine")
    with pytest.raises(UsageError, match=r"holds another sweep .*another --name"):
        planned(tmp_path, ["optimizer.lr=1,2"], name="mine")


def test_another_version_of_the_recipe_is_another_sweep(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    folders = []
    for epochs in (3, 4):
        recipe.write_text(RECIPE.read_text().replace("  epochs: 10", f"  epochs: {epochs}"))
        folders.append(plan_sweep(recipe, WORDS, runs=tmp_path, scale="mini").folder)
    assert folders[0] != folders[1]


@pytest.mark.parametrize("table_id", ["lamb/8", *IMAGENET_TUNING])
def test_lamb_s_tuning_tables_are_grids(table_id: str) -> None:
    columns = grid_columns(table_id)
    assert math.prod(map(len, columns.values())) == len(find_rows(table_id))


@pytest.mark.parametrize("table_id", IMAGENET_TUNING)
def test_a_tuning_table_as_a_sweep_is_its_rows(table_id: str, tmp_path: Path) -> None:
    recipe, words = grid_of(table_id)
    sweep = plan_sweep(recipe.write(tmp_path / "rows"), words, runs=tmp_path)
    swept = {
        load_recipe(sweep.recipe, [f"{key}={value}" for key, value in point.items()]).hash for point in sweep.points[0]
    }
    rows = [recipe_of(row) for row in paper_table(table_id).rows]
    assert swept == {row.load().hash for row in rows if isinstance(row, RowRecipe)}
    assert len(swept) == len(rows)


def test_a_table_that_is_no_grid() -> None:
    with pytest.raises(UsageError, match="lamb/3 is no grid of settings; run it with: lbzoo table lamb/3 --run"):
        grid_of("lamb/3")
    row = recipe_of(paper_table("lamb/8").rows[0])
    if isinstance(row, Unavailable):  # until its task is built
        with pytest.raises(UsageError, match="not built yet"):
            grid_of("lamb/8")


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path) -> None:
    words = ["optimizer.name=momentum,vr_sgd", "optimizer.lr=0.01,0.05", "steps=5", "trainer.accelerator=cpu"]
    recipe = PACKAGE_RECIPES / "vrgd_linear_regression.yaml"
    command = [sys.executable, "-m", "lbzoo", "sweep", str(recipe), *words, "--scale", "mini", "--jobs", "2"]
    done = subprocess.run([*command, "--runs", str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": finished val/loss") == 4
    again = subprocess.run([*command, "--runs", str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert "4 of 4 trials done" in again.stdout
