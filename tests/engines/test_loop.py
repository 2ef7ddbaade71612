"""The accelerate engine's loop against Lightning's Trainer: the same hooks, the same logs, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import hook_tasks
import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights
from lightning.pytorch.plugins.precision import MixedPrecision

from lbzoo.engines import RunResult, fit, lightning, trainer_setup
from lbzoo.engines.accelerate import AccelerateMachine
from lbzoo.engines.loop_trainer import NotInThisEngine
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.errors import LbzooError, UsageError

RECIPE = """\
version: 1
seed: 3
task: {name: "hook_tasks:TASK"}
data: {name: "parity_tasks:Vectors", global_batch_size: 16, micro_batch_size: 4}
optimizer: {name: lamb, lr: 0.01}
schedule: {name: cosine}
steps: 4
trainer: {accelerator: cpu, validate_every: {steps: 2}}
logging: {every: 2, loggers: [csv]}
callbacks: [CALLBACKS]
"""
ENGINES = ["lightning", "accelerate"]


def recipe(folder: Path, task: str = "", callback: str = "") -> Path:
    path = folder / "loop.yaml"
    name = f'"hook_tasks:{task}"' if task else '"parity_tasks:LayerNormNet"'
    text = RECIPE.replace('"hook_tasks:TASK"', name)
    path.write_text(text.replace("CALLBACKS", f'"hook_tasks:{callback}"' if callback else ""))
    return path


def run(folder: Path, engine: str, task: str = "", callback: str = "", *overrides: str) -> RunResult:
    return fit(recipe(folder, task, callback), [f"trainer.engine={engine}", *overrides], runs=folder / engine)


def lines(result: RunResult) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    timed = ("time", "summary/samples_per_second")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read_metrics(result.run_dir / "metrics.jsonl")
    ]


def test_every_hook_in_lightning_s_order(tmp_path: Path) -> None:
    called = {}
    for engine in ENGINES:
        hook_tasks.calls.clear()
        run(tmp_path, engine, "Recording", "RecordingCallback", "trainer.gradient_clip_norm=1.0")
        called[engine] = list(hook_tasks.calls)
    assert called["accelerate"] == called["lightning"]
    names = {call.split()[0] for call in called["accelerate"]}
    assert names == {*hook_tasks.OF_BOTH, *hook_tasks.OF_MODULE}


def test_the_documentation_lists_every_hook() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    assert not [name for name in (*hook_tasks.OF_BOTH, *hook_tasks.OF_MODULE) if f"`{name}`" not in page]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_what_a_module_logs(tmp_path: Path, precision: str) -> None:
    """In training and validation, per step and per epoch, tensors and torchmetrics, from module and callback."""
    words = ("Logging", "LogsFromCallback", f"trainer.precision={precision}")
    expected, found = (lines(run(tmp_path, engine, *words)) for engine in ENGINES)
    assert found == expected
    assert [line["step"] for line in found] == [1, 2, 4]
    last = found[-1]
    assert {"fit/loss", "fit/both_step", "fit/both_epoch", "fit/synced", "fit/max", "fit/end"} <= last.keys()
    assert {"fit/accuracy_step", "fit/accuracy_epoch", "fit/weight", "callback/largest"} <= last.keys()
    assert "fit/silent" not in last
    assert last["val/size"] == pytest.approx((4 * 4 + 4 * 4 + 3 * 3) / 11), "each batch counts by its size"
    assert last["val/global_step"] == 4


@pytest.mark.dist
def test_what_a_module_logs_on_two_ranks(tmp_path: Path) -> None:
    found = {}
    for engine in ENGINES:
        job = (recipe(tmp_path, "Logging"), [f"trainer.engine={engine}"], tmp_path / engine)
        found[engine] = lines(on_ranks(2, fit_here, *job)[0])
    assert found["accelerate"] == found["lightning"]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_module_may_use(tmp_path: Path, engine: str) -> None:
    run(tmp_path, engine, "Curious")
    facts = dict(hook_tasks.Curious.facts)
    assert facts.pop("gathered").tolist() in (1.0, [1.0])
    assert facts.pop("lr") == facts.pop("last_lr")
    assert facts == {
        "device": torch.device("cpu"),
        "global_step": 3,
        "current_epoch": 0,
        "rank": (0, 0, 1),
        "is_global_zero": True,
        "max_steps": 4,
        "training": True,
        "loggers": ["MetricsFile", "_Csv"],
        "logger": "MetricsFile",
        "missing": "default",
    }


def test_micro_batches_without_a_loss(tmp_path: Path) -> None:
    expected, found = (run(tmp_path, engine, "LeavesOut") for engine in ENGINES)
    assert lines(found) == lines(expected)
    theirs, ours = saved_weights(expected.run_dir), saved_weights(found.run_dir)
    assert not [name for name in theirs if not torch.equal(theirs[name], ours[name])]


class Scaler(torch.amp.GradScaler):
    """A loss scaler for the CPU that overflows at first, and says what it did."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**24, growth_interval=2)
        self.scales: list[float] = []

    def update(self, new_scale: Any = None) -> None:
        super().update(new_scale)
        self.scales.append(self.get_scale())


def test_steps_whose_gradients_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 with loss scaling, which the engines only have on GPUs: an update is left out, its step counts."""
    scalers = {engine: Scaler() for engine in ENGINES}

    def hardware(*args: Any) -> dict[str, Any]:
        given = trainer_setup.hardware(*args)
        half = MixedPrecision("16-mixed", "cpu", scalers["lightning"])
        return {**given, "precision": None, "plugins": [*given["plugins"], half]}

    monkeypatch.setattr(lightning, "hardware", hardware)
    monkeypatch.setattr(AccelerateMachine, "_context", lambda self: torch.autocast("cpu", torch.float16))
    make = AccelerateMachine.__init__

    def with_scaler(self: AccelerateMachine, accelerator: Any, *rest: Any) -> None:
        accelerator.scaler = scalers["accelerate"]
        make(self, accelerator, *rest)

    monkeypatch.setattr(AccelerateMachine, "__init__", with_scaler)
    words = ("", "", "trainer.gradient_clip_norm=0.5", "steps=12", "logging.every=1")
    expected, found = (run(tmp_path, engine, *words) for engine in ENGINES)
    scales = scalers["accelerate"].scales
    assert scales == scalers["lightning"].scales
    assert scales[0] == 2.0**23, "the first step overflowed"
    assert any(later > earlier for earlier, later in pairwise(scales)), "and later ones did not"
    assert str(lines(found)) == str(lines(expected)), "NaN where a gradient is"
    theirs, ours = saved_weights(expected.run_dir), saved_weights(found.run_dir)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_stopping_early_validates_and_saves(tmp_path: Path, engine: str) -> None:
    result = run(tmp_path, engine, "", "StopsEarly")
    assert (result.state, result.step) == ("finished", 3)
    assert [line["step"] for line in lines(result) if "val/loss" in line] == [2, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_reaches_the_callbacks(tmp_path: Path, engine: str) -> None:
    hook_tasks.Fails.seen.clear()
    with pytest.raises(RuntimeError, match="out of luck"):
        run(tmp_path, engine, "", "Fails")
    assert hook_tasks.Fails.seen == ["out of luck"]
    assert run(tmp_path, engine).state == "finished", "nothing is left behind"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Manual", "Manual has automatic_optimization = False: manual optimization is not in the accelerate engine"),
        ("TwoOptimizers", "configure_optimizers gave 2 optimizers"),
        ("OnPlateau", r"ReduceLROnPlateau \(interval: epoch\): .*'interval': 'step'"),
    ],
)
def test_what_is_refused(tmp_path: Path, task: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path, "accelerate", task)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_optimizer_that_forgets_the_closure(tmp_path: Path, engine: str) -> None:
    with pytest.raises(UsageError, match="did not run the closure"):
        run(tmp_path, engine, "", "", "optimizer={name: 'hook_tasks:NoClosure', lr: 0.1}")


def test_a_callback_that_wants_all_of_lightning_s_trainer(tmp_path: Path) -> None:
    message = r"trainer\.fit_loop is not there with trainer\.engine=accelerate.*runs with trainer\.engine=lightning"
    with pytest.raises(NotInThisEngine, match=message) as caught:
        run(tmp_path, "accelerate", "", "WantsTheTrainer")
    assert isinstance(caught.value, LbzooError)
    assert run(tmp_path, "lightning", "", "WantsTheTrainer").state == "finished"


def test_a_second_accelerator_in_the_process(tmp_path: Path) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True)
    with pytest.raises(UsageError, match="this process has an Accelerator already"):
        run(tmp_path, "accelerate")
