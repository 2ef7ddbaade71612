"""What a resume keeps, and what it says: optimizer state between stages, callbacks' state, devices, signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import on_ranks
from fit_jobs import resume_and_listen, saved_weights
from kill_jobs import exit_code_of, fit_with_a_signal_at_the_start
from lightning.pytorch import Callback

from lbzoo.checkpoint import CheckpointFolder, load_callbacks, load_optimizer
from lbzoo.engines import fit
from lbzoo.engines.callback_states import restore_states, states_of
from lbzoo.engines.event_files import drop_events_after
from lbzoo.engines.run_callbacks import MicroBatchSeeds
from lbzoo.errors import CheckpointError, LbzooError
from lbzoo.optim import create_optimizer
from lbzoo.recipe import RecipeError, build_task, load_recipe

RECIPE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25}}
data: {name: digits, global_batch_size: 32, micro_batch_size: 16, image_size: 16}
optimizer: {name: lamb, lr: 0.01}
trainer: {accelerator: cpu, devices: 1, validate_every: {steps: 4}}
checkpoint: {every_steps: 1, keep_last: 10}
logging: {every: 1, loggers: []}
"""
STAGES = """\
stages:
  - {name: first, steps: 3}
  - {name: second, steps: 2, schedule: {name: constant, warmup_steps: 2}, optimizer: {reset: false, lr: 0.02}}
"""


def write(folder: Path, more: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE + more)
    return path


def optimizer_state(run: Path, step: int) -> dict[str, Any]:
    """The saved state of each parameter, by its name."""
    task = build_task(load_recipe(run / "recipe.yaml").stages[0])
    optimizer = create_optimizer(task, "lamb", lr=0.5)
    load_optimizer(CheckpointFolder(run / "checkpoints").step_path(step), task, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5], "options stay the optimizer's own"
    return {name: optimizer.state[parameter] for name, parameter in task.named_parameters()}


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_the_optimizer_s_state_is_carried_into_the_next_stage(tmp_path: Path, engine: str) -> None:
    """With a learning rate of 0 the second stage's moments are those of two more steps on the same weights."""
    recipe = write(tmp_path, STAGES)
    overrides = [f"trainer.engine={engine}", "stages.second.optimizer.lr=0"]
    kept = fit(recipe, overrides, runs=tmp_path / "kept").run_dir
    reset = fit(recipe, [*overrides, "stages.second.optimizer.reset=true"], runs=tmp_path / "reset").run_dir
    first, last, anew = optimizer_state(kept, 3), optimizer_state(kept, 5), optimizer_state(reset, 5)
    assert {float(state["step"]) for state in first.values()} == {3.0}
    assert {float(state["step"]) for state in last.values()} == {5.0}
    assert {float(state["step"]) for state in anew.values()} == {2.0}
    name = "model.head.fc.weight"
    same_gradients = anew[name]["exp_avg"]  # 0.1 (0.9 g1 + g2)
    expected = 0.81 * first[name]["exp_avg"] + same_gradients
    torch.testing.assert_close(last[name]["exp_avg"], expected, rtol=1e-5, atol=1e-8)


def test_state_of_another_optimizer_is_not_kept(tmp_path: Path) -> None:
    recipe = write(tmp_path, STAGES.replace("reset: false", "name: novograd, reset: false"))
    with pytest.raises(RecipeError, match=r"small\.yaml:11: .*stage 'second' cannot keep the state of 'lamb'"):
        load_recipe(recipe)


def test_state_of_other_parameters_is_not_kept(tmp_path: Path) -> None:
    recipe = write(tmp_path, STAGES)
    overrides = ["stages.second.task.model_args={layers: [1, 1, 1, 2], width_factor: 0.25}"]
    with pytest.raises(CheckpointError, match="the state of another optimizer or model"):
        fit(recipe, overrides, runs=tmp_path)


def stop_in_step(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    original = MicroBatchSeeds.on_train_batch_start

    def hook(callback: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        original(callback, trainer, module, batch, batch_idx)
        if trainer.global_step == step - 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(MicroBatchSeeds, "on_train_batch_start", hook)


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_the_scheduler_s_signal_is_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    recipe = write(tmp_path, "steps: 4\n")
    overrides = ["checkpoint={every_steps: 100, requeue_signal: SIGUSR2}", f"trainer.engine={engine}"]
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2, signal.SIGUSR2)
        stopped = fit(recipe, overrides, runs=tmp_path)
    assert (stopped.state, stopped.exit_code, stopped.step) == ("interrupted", 128 + signal.SIGUSR2, 2)
    assert fit(recipe, overrides, runs=tmp_path, resume="auto").step == 4


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step(tmp_path: Path, engine: str, signum: int) -> None:
    """There is nothing to save: the run leaves at once, and says how."""
    recipe = write(tmp_path, "steps: 2\n")
    words = [f"trainer.engine={engine}"]
    assert exit_code_of(fit_with_a_signal_at_the_start, recipe, words, tmp_path, signum) == 128 + signum
    status = json.loads((tmp_path / "small" / "1" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 128 + signum)


@pytest.mark.dist
def test_other_devices_keep_the_global_batch_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped on one device, finished on two: the weights of one device alone, but for rounding."""
    recipe = write(tmp_path, "steps: 4\n")
    whole = fit(recipe, runs=tmp_path / "whole").run_dir
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2, signal.SIGTERM)
        fit(recipe, runs=tmp_path / "cut")
    said = on_ranks(2, resume_and_listen, recipe, tmp_path / "cut")
    assert said[0][-1] == (
        "saved on 1 devices, goes on on 2: the global batch stays 32 = 16 x 2 devices x 1 accumulated"
    )
    assert said[1] == []
    expected, actual = saved_weights(whole), saved_weights(tmp_path / "cut" / "small" / "1")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5, msg=name)


class Counting(Callback):
    def __init__(self) -> None:
        self.count: Any = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_callbacks_of_one_class_keep_their_own_state() -> None:
    one, two, fresh = Counting(), Counting(), Counting()
    one.count, two.count = {"a": [1, None, "x", torch.ones(2)]}, 7
    states = states_of([one, Callback(), two])
    assert list(states) == ["Counting", "Counting.2"]
    other = Counting()
    restore_states([other, fresh], states)
    assert fresh.count == 7
    assert other.count["a"][:3] == [1, None, "x"]


def test_a_state_that_could_not_be_read_back_is_named() -> None:
    counting = Counting()
    counting.count = [{"x": Path("a")}]
    with pytest.raises(LbzooError, match=r"callback Counting: its state_dict\(\) holds a PosixPath"):
        states_of([counting])


def test_states_are_in_the_checkpoint(tmp_path: Path) -> None:
    recipe = write(tmp_path, "steps: 2\ncallbacks: [trust_ratio, noise_scale]\n")
    run = fit(recipe, runs=tmp_path).run_dir
    states = load_callbacks(CheckpointFolder(run / "checkpoints").step_path(2))
    assert states["TrustRatio"]["history"]["steps"] == [1, 2]
    assert states["NoiseScale"]["noise"]["steps"] == 2
    assert states["Divergence"]["loss"][1] == 2, "that of the last step too"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_events_are_cut_back(tmp_path: Path) -> None:
    """Whole records stay as they are, byte for byte; a cut one goes."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("x", step / 8, step)
    (file,) = tmp_path.glob("events.*")
    before = file.read_bytes()
    drop_events_after(tmp_path, 5)
    assert file.read_bytes() == before
    file.write_bytes(before[:-7])
    drop_events_after(tmp_path, 9)
    drop_events_after(tmp_path, 3)
    assert before.startswith(file.read_bytes())
    assert [event.step for event in EventFileLoader(str(file)).Load() if event.summary.value] == [1, 2, 3]
    whole = file.read_bytes()
    length = 2**5
    damaged = length.to_bytes(8, "little") + bytes(4) + b"\xff" * length + bytes(4)
    file.write_bytes(whole + damaged)
    drop_events_after(tmp_path, 9)
    assert file.read_bytes() == whole, "what is no event goes"
