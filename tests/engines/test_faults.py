"""Runs on disks that fill up, folders that cannot be written, data that vanishes, slow ranks, clocks that jump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fault_jobs
import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import Logger

from lbzoo.checkpoint import CheckpointFolder
from lbzoo.engines import distributed, fit
from lbzoo.engines.distributed import lost_rank
from lbzoo.engines.loggers import build_loggers
from lbzoo.engines.metrics_file import MetricsFile, read_metrics
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import CheckpointError, LbzooError
from lbzoo.recipe import load_recipe

RECIPE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25}}
data: {name: digits, global_batch_size: 32, micro_batch_size: 16, image_size: 16}
optimizer: {name: lamb, lr: 0.01}
steps: 5
trainer: {accelerator: cpu, devices: 1, validate_every: {steps: 5}}
checkpoint: {every_steps: 1, keep_last: 10}
logging: {every: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return saved_weights(fit_here(recipe, [], tmp_path_factory.mktemp("runs")).run_dir)


def steps(runs: Path) -> list[int]:
    return CheckpointFolder(runs / "small" / "1" / "checkpoints").steps()


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_ends_the_run_by_default(recipe: Path, tmp_path: Path, engine: str, asynchronous: str) -> None:
    """With exit code 1 and the cause; the checkpoint before is whole, and the run goes on from it."""
    overrides = [f"trainer.engine={engine}", f"checkpoint.asynchronous={asynchronous}"]
    with fault_jobs.no_room_at(3), pytest.raises(CheckpointError, match=r"step_00000003 could not be written: .*space"):
        fit(recipe, overrides, runs=tmp_path)
    status = json.loads((tmp_path / "small" / "1" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "No space left on device" in status["error"]
    assert steps(tmp_path) == [1, 2]
    assert fit(recipe, overrides, runs=tmp_path, resume="auto").step == 5


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_or_it_goes_on(
    recipe: Path,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    asynchronous: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides = ["checkpoint.on_error=warn", f"checkpoint.asynchronous={asynchronous}"]
    with fault_jobs.no_room_at(2, 3):
        result = fit(recipe, overrides, runs=tmp_path)
    assert (result.state, result.step) == ("finished", 5)
    assert steps(tmp_path) == [1, 4, 5]
    warnings = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert len(warnings) == 2
    actual = saved_weights(result.run_dir)
    assert all(torch.equal(actual[name], value) for name, value in whole.items())


@pytest.mark.dist
def test_a_full_disk_of_one_rank(recipe: Path, tmp_path: Path) -> None:
    """Two ranks, one of which cannot write: both warn, both go on."""
    assert on_ranks(2, fault_jobs.fit_without_room_on_rank_1, recipe, tmp_path) == ["finished", "finished"]
    assert steps(tmp_path) == [1, 2, 4, 5]


def test_metrics_survive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged meanwhile is lost; what is written before and after is whole."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, lambda step: {})
    original = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "metrics.jsonl":
            with original(self, *args, **kwargs) as there:  # a part of the line still finds room
                there.seek(0, os.SEEK_END)
                there.write(b'{"step": 2, "lo')
            raise OSError(28, os.strerror(28))
        return original(self, *args, **kwargs)

    file.log_metrics({"loss": 1.0}, 1)
    file.save()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        for step in (2, 3):
            file.log_metrics({"loss": 1.0}, step)
        file.save()
    file.log_metrics({"loss": 1.0}, 4)
    file.finalize("success")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3, 4], "the last one is tried again"


def test_tensorboard_survives_a_full_disk(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.event_file_writer import _AsyncWriter

    def full(self: Any, content: bytes) -> None:
        raise OSError(28, os.strerror(28))

    loggers = build_loggers(load_recipe(recipe), RunFolder(tmp_path), resume_step=0, describe_step=lambda step: {})
    assert loggers[1].experiment is not None
    monkeypatch.setattr(_AsyncWriter, "write", full)
    for step in range(1, 4):
        for logger in loggers:
            logger.log_metrics({"loss": 1.0}, step)
    for logger in loggers:
        logger.save()
        logger.finalize("success")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1


def test_csv_survives_a_full_disk_and_a_kill(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(step: int) -> Logger:
        resolved = load_recipe(recipe, ["logging.loggers=[csv]"])
        return build_loggers(resolved, RunFolder(tmp_path), resume_step=step, describe_step=lambda step: {})[1]

    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    logger = build(0)
    with monkeypatch.context() as patch:
        patch.setattr(_ExperimentWriter, "save", full)
        logger.log_metrics({"loss": 1.0}, 1)
        logger.save()
    logger.log_metrics({"loss": 0.5}, 2)
    logger.finalize("success")
    file = tmp_path / "csv" / "from_step_0" / "metrics.csv"
    whole = file.read_text()
    assert whole.split() == ["loss,step", "1.0,1", "0.5,2"]
    file.write_text(whole + "0.2")
    build(2)
    assert file.read_text().split() == whole.split()


def test_a_reader_of_the_output_who_leaves(recipe: Path, tmp_path: Path) -> None:
    """``lbzoo fit ... | head -1``: the run goes on, and ends as it would."""
    command = [sys.executable, "-m", "lbzoo", "fit", str(recipe), "callbacks=[{name: progress, line_seconds: 0}]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--runs", str(tmp_path)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
    assert run.returncode == 0, errors
    assert json.loads((tmp_path / "small" / "1" / "status.json").read_text())["state"] == "finished"
    assert not errors


def test_a_pipe_that_breaks_is_no_lost_rank() -> None:
    with patch.object(distributed, "has_other_ranks", lambda: True):
        assert lost_rank(BrokenPipeError(32, "Broken pipe"), 1800) is None
        assert lost_rank(RuntimeError("Connection closed by peer [127.0.0.1]:1"), 1800) is not None
    assert lost_rank(RuntimeError("a service timed out"), 1800) is None


def test_a_folder_that_cannot_be_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run says so before it starts, a resumed one too."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LbzooError, match=r"cannot write the run folder below .*--runs DIR"):
        fit(recipe, runs=tmp_path / "runs")
    run = fit(recipe, ["steps=1"], runs=tmp_path / "there").run_dir
    original = Path.write_text

    def refused(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.is_relative_to(run):
            raise PermissionError(13, os.strerror(13))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(LbzooError, match=r"cannot write .*environment\.json: Permission denied"):
        fit(recipe, ["steps=1"], resume=run)


VANISHING = """\
import os
from lbzoo.data.digits import Digits
from lbzoo.data.in_memory import TensorSamples
from lbzoo.errors import DataError
from lbzoo.registry import register_data


class Samples(TensorSamples):
    taken = 0

    def __getitems__(self, keys):
        self.taken += 1
        if os.environ.get("RANK") == "1" and self.taken == 4:
            raise DataError("cannot read /data/train-00003: No such file or directory")
        return super().__getitems__(keys)


@register_data("vanishing")
class Vanishing(Digits):
    def train_dataset(self, *, seed=0):
        return Samples(*super().train_dataset(seed=seed).tensors)
"""


@pytest.mark.dist
@pytest.mark.slow
def test_data_that_vanishes_on_one_rank(tmp_path: Path) -> None:
    """The run ends at once, with the words of the rank that misses something; the checkpoints are there."""
    (tmp_path / "vanishing.py").write_text(VANISHING)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE.replace("name: digits", "name: vanishing") + "plugins: [./vanishing.py]\n")
    words = [sys.executable, "-m", "lbzoo", "fit", str(recipe), "trainer.devices=2", "--runs", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1, done.stderr
    assert "[rank 1] cannot read /data/train-00003: No such file or directory" in done.stderr
    status = json.loads((tmp_path / "small" / "1" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "rank 1: cannot read /data/train-00003" in status["error"]
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.dist
def test_a_slow_rank_is_waited_for(recipe: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert on_ranks(2, fault_jobs.fit_with_a_slow_rank, recipe, tmp_path) == ["finished", "finished"]
    actual = saved_weights(tmp_path / "small" / "1")
    for name, value in whole.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_clock_that_is_set_back(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times in the log only grow, and a resume takes the run that was last, whatever its time says."""
    now, begun = time.time, time.monotonic()
    monkeypatch.setattr("time.time", lambda: now() - (3600 if time.monotonic() > begun + 0.5 else 0))
    result = fit(recipe, runs=tmp_path)
    seconds = [line["time"] for line in read_metrics(result.run_dir / "metrics.jsonl")]
    assert len(seconds) == 5
    assert sorted(seconds) == seconds
    assert 0 <= seconds[0] < 600
