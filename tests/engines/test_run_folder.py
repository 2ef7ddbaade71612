from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from lbzoo.engines.metrics_file import MetricsFile, read_metrics
from lbzoo.engines.run_folder import RunFolder, create_run, find_unfinished, run_of
from lbzoo.errors import CheckpointError, LbzooError


def make_run(root: Path, state: str, *, checkpoint: bool, scale: str = "paper") -> RunFolder:
    run = create_run(root, "r")
    run.write_status(state, scale=scale)  # type: ignore[arg-type]
    if checkpoint:
        run.checkpoints.step_path(5).mkdir(parents=True)
    return run


def test_runs_that_start_together_get_different_numbers(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(create_run(tmp_path, "r").path.name)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=int) == [str(n) for n in range(1, 9)]


def test_the_newest_unfinished_run(tmp_path: Path) -> None:
    assert find_unfinished(tmp_path, "r", "paper") is None
    make_run(tmp_path, "interrupted", checkpoint=True)
    second = make_run(tmp_path, "failed", checkpoint=True)
    make_run(tmp_path, "failed", checkpoint=False)
    make_run(tmp_path, "failed", checkpoint=True, scale="mini")
    assert find_unfinished(tmp_path, "r", "paper") == second
    make_run(tmp_path, "finished", checkpoint=True)
    assert find_unfinished(tmp_path, "r", "paper") is None


def test_status_keeps_what_is_not_written_again(tmp_path: Path) -> None:
    run = create_run(tmp_path, "r")
    run.write_status("running", step=3)
    started = run.status()["started"]
    run.write_status("finished", exit_code=0)
    assert run.status() | {"state": "finished", "step": 3, "exit_code": 0, "started": started} == run.status()


def test_environment_has_an_entry_a_start(tmp_path: Path) -> None:
    run = create_run(tmp_path, "r")
    run.write_environment()
    run.write_environment()
    starts = json.loads((run.path / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["packages"]["torch"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LbzooError, match=r"cannot write the run folder.*--runs"):
        create_run(tmp_path / "runs", "r")


def test_run_of(tmp_path: Path) -> None:
    run = make_run(tmp_path, "failed", checkpoint=True)
    run.recipe_file.write_text("version: 1\n")
    assert run_of(run.checkpoints.step_path(5)).path == run.path
    assert run_of(run.checkpoints.path).path == run.path
    with pytest.raises(CheckpointError, match="not in a run folder"):
        run_of(tmp_path)


def describe(step: int) -> dict[str, object]:
    return {"stage": "main", "epoch": step / 10, "samples": step * 4}


def test_one_line_a_step_and_none_twice_after_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, 0, describe)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": 1.0 / step}, step)
        first.log_metrics({"summary/lr": 0.1, "epoch": 0}, step)
    first.finalize("success")
    with file.open("a") as handle:
        handle.write('{"step": 4, "cut sho')
    again = MetricsFile(file, 2, describe)
    again.log_metrics({"train/loss": float("nan")}, 3)
    again.finalize("success")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["train/loss"] == 0.5
    assert lines[1]["samples"] == 8
    assert lines[1]["epoch"] == 0.2
    assert lines[2]["train/loss"] == "nan"
    assert read_metrics(file) == lines


def test_time_goes_on_over_stages_and_resumes(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "stage": "a", "time": 1000.0, "train/loss": 1.0}\n')
    later = MetricsFile(file, 2, describe)
    later.log_metrics({"train/loss": 0.5}, 3)
    later.finalize("success")
    first, second = read_metrics(file)
    assert first["time"] == 1000.0
    assert 1000.0 <= second["time"] < 1100.0
