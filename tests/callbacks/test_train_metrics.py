"""TrainMetrics against a plain loop in float64."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from plain_trainer import Plain, adamw, data, fit, scalars, tensorboard
from torch.utils._python_dispatch import TorchDispatchMode

from lbzoo.callbacks.throughput import Reading, TrainingClock, samples_per_second, seconds_left
from lbzoo.callbacks.train_metrics import TrainMetrics


def by_hand(module: Plain, *, steps: int, accumulate: int, clip: float) -> list[dict[str, float]]:
    """(loss, lr, gradient norm before clipping) of every step."""
    module = module.double()
    optimizer = module.make_optimizer(module)
    lr, batches, rows = optimizer.param_groups[0]["lr"], list(data()) * steps, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * module.decay**step
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for x, y in batches[step * accumulate : (step + 1) * accumulate]:
            loss = loss + module.training_step((x.double(), y), 0) / accumulate
        loss.backward()
        norm = sum(float((p.grad**2).sum()) for p in module.parameters()) ** 0.5
        rows.append({"loss": loss.item(), "lr": lr * module.decay**step, "norm": norm})
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return rows


@pytest.mark.parametrize("accumulate", [1, 4])
def test_numbers_equal_a_plain_loop(tmp_path: Path, accumulate: int) -> None:
    rows = by_hand(Plain(adamw, decay=0.8), steps=8, accumulate=accumulate, clip=0.3)
    fit(
        Plain(adamw, decay=0.8),
        TrainMetrics(every=3),
        logger=tensorboard(tmp_path),
        max_steps=8,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.3,
        precision="64-true",
    )
    logged = scalars(tmp_path)
    mean = {step: sum(row["loss"] for row in rows[a:step]) / (step - a) for a, step in ((0, 1), (1, 3), (3, 6))}
    assert logged["train/loss"] == pytest.approx(mean, rel=1e-6)
    assert logged["summary/lr"] == pytest.approx({s: rows[s - 1]["lr"] for s in mean}, rel=1e-6)
    assert logged["summary/grad_norm"] == pytest.approx({s: rows[s - 1]["norm"] for s in mean}, rel=1e-6)
    assert logged["summary/epoch"] == pytest.approx({s: s * accumulate * 4 / 48 for s in mean}, rel=1e-6)
    assert set(logged["summary/samples_per_second"]) == {3, 6}  # the first step is not timed


def test_epoch_counts_partial_batches(tmp_path: Path) -> None:
    """10 samples in micro-batches of 4, two a step: an epoch is two steps, the second of 2 samples."""
    loader = data(samples=10)
    fit(
        Plain(adamw),
        TrainMetrics(every=1),
        logger=tensorboard(tmp_path),
        loader=loader,
        max_steps=4,
        accumulate_grad_batches=2,
    )
    assert scalars(tmp_path)["summary/epoch"] == pytest.approx({1: 0.8, 2: 1.0, 3: 1.8, 4: 2.0})


def test_loss_of_a_partial_window_is_its_mean(tmp_path: Path) -> None:
    class Constant(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return 0.0 * super().training_step(batch, batch_idx) + 3.0

    fit(
        Constant(adamw),
        TrainMetrics(every=1),
        logger=tensorboard(tmp_path),
        loader=data(samples=12),
        accumulate_grad_batches=2,
        max_steps=2,
    )
    assert scalars(tmp_path)["train/loss"] == {1: 3.0, 2: 3.0}


def test_skipped_micro_batches_are_left_out(tmp_path: Path) -> None:
    class Skipping(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return None if batch_idx else super().training_step(batch, batch_idx)

    fit(Skipping(adamw), TrainMetrics(every=2), logger=tensorboard(tmp_path), max_steps=4)
    logged = scalars(tmp_path)
    assert set(logged["train/loss"]) == {1}
    assert set(logged["summary/lr"]) == {1, 2, 4}


def test_lr_is_the_schedules_where_a_group_has_an_lr_scale(tmp_path: Path) -> None:
    def scaled(module: torch.nn.Module) -> torch.optim.Optimizer:
        first, second, *rest = module.parameters()
        groups = [
            {"params": [first], "lr": 0.0, "lr_scale": 0.0},
            {"params": [second], "lr": 0.01, "lr_scale": 0.1},
            {"params": rest},
        ]
        return torch.optim.SGD(groups, lr=torch.tensor(0.1))

    fit(Plain(scaled, decay=0.5), TrainMetrics(every=1), logger=tensorboard(tmp_path), max_steps=2)
    assert scalars(tmp_path)["summary/lr"] == pytest.approx({1: 0.1, 2: 0.05})


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    """Once with the callback's state, as Lightning restores it, and once without, as from a foreign checkpoint."""
    whole = tmp_path / "whole"
    fit(Plain(adamw), TrainMetrics(every=2), logger=tensorboard(whole), max_steps=8)
    first = fit(Plain(adamw), TrainMetrics(every=2), max_steps=5)
    first.save_checkpoint(tmp_path / "at_5.ckpt")
    fit(Plain(adamw), TrainMetrics(every=1), logger=tensorboard(tmp_path / "first"), max_steps=5)
    checkpoint = torch.load(tmp_path / "at_5.ckpt", weights_only=False)
    assert checkpoint["callbacks"]["TrainMetrics"]["samples"] == 20
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, tmp_path / "stateless.ckpt")
    for name in ("at_5", "stateless"):
        fit(
            Plain(adamw),
            TrainMetrics(every=2),
            logger=tensorboard(tmp_path / name),
            max_steps=8,
            ckpt_path=tmp_path / f"{name}.ckpt",
        )
        logged, expected = scalars(tmp_path / name), scalars(whole)
        assert set(logged["summary/lr"]) == {6, 8}
        assert logged["summary/epoch"] == {step: expected["summary/epoch"][step] for step in (6, 8)}
        assert set(logged["train/loss"]) == {6, 8}
        # Lightning begins the epoch's samples anew, so what the resumed run logs is compared with itself, step by step.
        fit(
            Plain(adamw),
            TrainMetrics(every=1),
            logger=tensorboard(tmp_path / f"{name} step by step"),
            max_steps=8,
            ckpt_path=tmp_path / "stateless.ckpt",
        )
        loss = scalars(tmp_path / f"{name} step by step")["train/loss"]
        fifth = [scalars(tmp_path / "first")["train/loss"][5]] if name == "at_5" else []  # the state has step 5's
        means = {6: sum([*fifth, loss[6]]) / len([*fifth, loss[6]]), 8: (loss[7] + loss[8]) / 2}
        assert logged["train/loss"] == pytest.approx(means, rel=1e-6)


class _Reads(TorchDispatchMode):
    """Counts the reads of single values: what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_device_is_read_on_logged_steps_only() -> None:
    reads: dict[int, int] = {}

    class Watched(TrainMetrics):
        def on_before_optimizer_step(self, *args: Any) -> None:
            with _Reads() as mode:
                super().on_before_optimizer_step(*args)
            reads[args[0].global_step + 1] = mode.count

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            with _Reads() as mode:
                super().on_train_batch_end(trainer, *args)
            reads[trainer.global_step] = reads.get(trainer.global_step, 0) + mode.count

    fit(Plain(adamw), Watched(every=4), accumulate_grad_batches=2)
    assert [step for step, count in reads.items() if count] == [1, 4, 8, 12]


class Clock:
    """Stands for time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_throughput_leaves_out_the_first_step_and_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    time_, clock = Clock(monkeypatch), TrainingClock()
    clock.pause()  # before the first step: not counted in any case
    time_.now += 60
    clock.resume()
    assert clock.read() == Reading()
    time_.now += 30
    clock.count(100)
    for _ in range(4):
        time_.now += 2
        clock.count(100)
    assert clock.read() == Reading(steps=4, samples=400, seconds=8.0, wall_seconds=8.0)
    time_.now += 1
    clock.pause()
    time_.now += 9
    assert clock.read() == Reading(steps=4, samples=400, seconds=8.0, wall_seconds=8.0)
    clock.resume()
    time_.now += 1
    clock.count(50)
    assert clock.read() == Reading(steps=5, samples=450, seconds=10.0, wall_seconds=19.0)
    assert samples_per_second(Reading(), clock.read()) == pytest.approx(450 / 10)
    assert seconds_left(clock.read(), 10) == pytest.approx(19 / 5 * 10)
    earlier = clock.read()
    assert samples_per_second(earlier, clock.read()) is None
    assert seconds_left(Reading(), 10) is None


def test_samples_per_second_is_of_the_steps_since_the_last_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step n takes n seconds of the clock, a validation 100."""
    time_ = Clock(monkeypatch)

    class Slow(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time_.now += self.trainer.global_step + 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time_.now += 100

    fit(
        Slow(adamw),
        TrainMetrics(every=2),
        logger=tensorboard(tmp_path),
        max_steps=6,
        validate=True,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    expected = {2: 4 / 2, 4: 8 / (3 + 4), 6: 8 / (5 + 6)}
    assert scalars(tmp_path)["summary/samples_per_second"] == pytest.approx(expected)
