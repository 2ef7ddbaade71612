"""What every task gets from its base: the bound optimizer, and the learning rate of each optimizer step."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lbzoo.schedules import build_schedule
from lbzoo.tasks.base import Task


class Line(Task):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()


class LearningRates(pl.Callback):
    """What the optimizer steps were taken with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])


def fit(task: Task, steps: int, accumulate: int) -> list[list[float]]:
    rates = LearningRates()
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[rates],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, torch.utils.data.DataLoader(torch.ones(64, 1), batch_size=4))
    return rates.seen


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:GPU available")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_t_is_taken_with_the_multiplier_of_t(accumulate: int) -> None:
    """Every group's own rate, times the schedule; the learning rate moves with optimizer steps, not micro-batches."""
    schedule = build_schedule("cosine", steps=5, steps_per_epoch=1.0, warmup_steps=2)
    task = Line()

    def make(module: nn.Module) -> torch.optim.Optimizer:
        layer = module.get_submodule("layer")
        groups = [{"params": [layer.weight], "lr": 0.5}, {"params": [layer.bias], "lr": torch.tensor(0.25)}]
        return torch.optim.SGD(groups, lr=1.0)

    task.bind(make, schedule)
    rates = fit(task, 5, accumulate)
    assert rates == [[pytest.approx(0.5 * schedule(t)), pytest.approx(0.25 * schedule(t))] for t in range(1, 6)]


def test_the_factory_gets_the_task() -> None:
    task = Line()
    seen = []

    def make(module: nn.Module) -> torch.optim.Optimizer:
        seen.append(module)
        return torch.optim.SGD(module.parameters(), lr=0.1)

    task.bind(make, lambda t: 1.0)
    task.configure_optimizers()
    assert seen == [task]


def test_state_of_the_scheduler_holds_no_schedule() -> None:
    task = Line()
    task.bind(
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        build_schedule("constant", steps=3, steps_per_epoch=1),
    )
    scheduler = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.state_dict()["lr_lambdas"] == [None]


def test_a_task_that_was_not_bound() -> None:
    with pytest.raises(RuntimeError, match=r"Line has no optimizer: call bind"):
        Line().configure_optimizers()
