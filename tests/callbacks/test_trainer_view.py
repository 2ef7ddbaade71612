"""The facts derived from the narrow view, and a training loop that is not Lightning's behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from plain_trainer import Plain, adamw, data, fake_layerwise, fit, scalars, tensorboard
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lbzoo.callbacks.train_metrics import TrainMetrics
from lbzoo.callbacks.trainer_view import (
    TrainerView,
    coming_step,
    is_logged,
    loss_scale,
    num_train,
    samples_in,
    steps_done_in_stage,
    total_steps,
)
from lbzoo.callbacks.trust_ratio import TrustRatio


@dataclass
class OtherTrainer:
    """A TrainerView and no more: a callback that touches anything else fails on it."""

    lightning_module: pl.LightningModule
    optimizers: list[torch.optim.Optimizer]
    loggers: list[Logger]
    train_dataloader: Any
    accumulate_grad_batches: int
    max_steps: int
    global_step: int = 0
    callback_metrics: dict[str, Tensor] = field(default_factory=dict)
    num_val_batches: list[int] = field(default_factory=list)
    model: nn.Module | None = None
    is_global_zero: bool = True
    world_size: int = 1
    sanity_checking: bool = False

    def fit(self, *callbacks: Any) -> None:
        module, (optimizer,) = self.lightning_module, self.optimizers
        for callback in callbacks:
            callback.on_train_start(self, module)
        batches = iter(list(self.train_dataloader) * 8)
        for _ in range(self.max_steps):
            optimizer.zero_grad()
            for index in range(self.accumulate_grad_batches):
                batch = next(batches)
                loss = module.training_step(batch, index) / self.accumulate_grad_batches
                loss.backward()
                if index + 1 == self.accumulate_grad_batches:
                    for callback in callbacks:
                        callback.on_before_optimizer_step(self, module, optimizer)
                    optimizer.step()
                    self.global_step += 1
                for callback in callbacks:
                    callback.on_train_batch_end(self, module, {"loss": loss.detach()}, batch, index)
        for callback in callbacks:
            callback.on_train_end(self, module)


@pytest.mark.parametrize("make_optimizer", [adamw, fake_layerwise])
def test_another_loop_logs_what_lightning_logs(tmp_path: Path, make_optimizer: Any) -> None:
    callbacks = lambda: (TrustRatio(every=3), TrainMetrics(every=3))  # noqa: E731
    fit(Plain(make_optimizer), *callbacks(), logger=tensorboard(tmp_path / "one"), accumulate_grad_batches=2)
    module, logger = Plain(make_optimizer), tensorboard(tmp_path / "two")
    other = OtherTrainer(module, [make_optimizer(module)], [logger], data(), accumulate_grad_batches=2, max_steps=12)
    other.fit(*callbacks())
    logger.save()
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for table in (one, two):
        table.pop("summary/samples_per_second")
    assert one.keys() == two.keys()
    for tag in one:
        assert one[tag] == pytest.approx(two[tag], rel=1e-5), tag


def view(**facts: Any) -> TrainerView:
    return cast(TrainerView, SimpleNamespace(**facts))


def test_logged_steps_are_the_first_and_the_multiples() -> None:
    assert [step for step in range(1, 101) if is_logged(step, 25)] == [1, 25, 50, 75, 100]
    assert [step for step in range(1, 4) if is_logged(step, 1)] == [1, 2, 3]


def test_steps_of_several_optimizers() -> None:
    assert [coming_step(view(global_step=s, optimizers=["a"])) for s in (0, 1, 2)] == [1, 2, 3]
    assert [coming_step(view(global_step=s, optimizers=["a", "b"])) for s in (0, 1, 2, 3)] == [1, 1, 2, 2]


def test_steps_of_a_stage() -> None:
    assert steps_done_in_stage(view(global_step=30, optimizers=["a"])) == 30
    assert steps_done_in_stage(view(global_step=30, optimizers=["a"], first_step=20)) == 10


def test_total_steps() -> None:
    assert total_steps(view(max_steps=100)) == 100
    assert total_steps(view(max_steps=-1)) is None
    assert total_steps(view(max_steps=-1, estimated_stepping_batches=40)) == 40
    assert total_steps(view(max_steps=100, estimated_stepping_batches=40)) == 40
    assert total_steps(view(max_steps=-1, estimated_stepping_batches=float("inf"))) is None


def test_samples_in_a_batch() -> None:
    x, y = torch.zeros(5, 3), torch.zeros(5)
    assert samples_in(x) == 5
    assert samples_in([x, y]) == 5
    assert samples_in({"label": "text", "nested": (torch.tensor(1.0), [y])}) == 5
    assert samples_in("text") == samples_in(None) == samples_in(torch.tensor(3.0)) == samples_in([]) == 0


def test_num_train() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            yield torch.zeros(1)

    assert num_train(view(train_dataloader=data(samples=48))) == 48
    assert num_train(view(train_dataloader=DataLoader(Stream()))) is None
    assert num_train(view(train_dataloader=[1, 2])) is None


def test_loss_scale_is_asked_for_optimizers_that_unscale_themselves() -> None:
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    fp16 = view(precision_plugin=SimpleNamespace(scaler=scaler))
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert loss_scale(fp16, plain) == 1.0
    plain._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    assert loss_scale(fp16, plain) == 1024.0
    assert loss_scale(view(precision_plugin=SimpleNamespace(scaler=None)), plain) == 1.0
    assert loss_scale(view(), plain) == 1.0
