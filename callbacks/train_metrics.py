"""The few numbers that every training is watched by: loss, learning rate, gradient norm, throughput, epoch.

Tags: ``train/loss`` (mean over the optimizer steps since the last logged one, and over the ranks), ``summary/lr``,
``summary/grad_norm`` (of the global batch's gradient before clipping), ``summary/samples_per_second`` (of all ranks,
without validations) and ``summary/epoch`` (samples seen / samples of the training set).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lbzoo.callbacks.log_values import log_scalars
from lbzoo.callbacks.optimizer_view import learning_rate, parameters, unwrap
from lbzoo.callbacks.step_loss import LossSum
from lbzoo.callbacks.throughput import TrainingClock, samples_per_second
from lbzoo.callbacks.trainer_view import (
    TrainerView,
    at_least_one,
    coming_step,
    is_logged,
    loss_scale,
    num_train,
    samples_in,
    steps_done_in_stage,
)
from lbzoo.registry import register_callback
from lbzoo.sharding import total_grad_norm


@register_callback("train_metrics")
class TrainMetrics(Callback):
    """Loss, learning rate, gradient norm, samples a second and epoch, every ``every`` optimizer steps.

    The device is read on logged steps only.
    """

    def __init__(self, *, every: int = 50) -> None:
        self.every = at_least_one(every)
        self._restored: dict[str, Any] | None = None
        self._device = torch.device("cpu")
        self._begin()

    def _begin(self) -> None:
        self._clock = TrainingClock()
        self._logged = self._clock.read()
        self._loss = LossSum()
        self._window = 0  # samples of the coming step so far, of all ranks
        # Seen in this stage; None until the first step tells the size of a batch, for the steps before a resume.
        self._samples: int | None = None
        self._steps_before = 0
        self._stepping = False
        self._scalars: dict[str, float | Tensor] = {}

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._begin()
        self._device = pl_module.device
        if (restored := self._restored) is not None:
            self._restored, self._samples = None, restored.get("samples")
            if trainer.is_global_zero and "loss" in restored:
                self._loss.load_state(restored["loss"], self._device)
        self._steps_before = steps_done_in_stage(trainer)

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepping = True
        if is_logged(coming_step(trainer), self.every):
            bare = unwrap(optimizer)
            norm = total_grad_norm(parameters(bare)) / loss_scale(trainer, bare)
            self._scalars = {"summary/lr": learning_rate(bare), "summary/grad_norm": norm}

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._window += samples_in(batch) * trainer.world_size
        self._loss.add(outputs, trainer.accumulate_grad_batches)
        if self._stepping:
            self._stepping = False
            if self._samples is None:
                self._samples = self._steps_before * self._window
            self._samples += self._window
            self._clock.count(self._window)
            self._window = 0
        if self._scalars:
            self._log(trainer, pl_module.device)

    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._clock.pause()

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._clock.resume()

    def _log(self, trainer: TrainerView, device: torch.device) -> None:
        scalars, self._scalars = self._scalars, {}
        loss = _mean_over_ranks(self._loss.take(), trainer.world_size, device)
        if loss is not None:
            scalars["train/loss"] = loss
        now = self._clock.read()
        speed, self._logged = samples_per_second(self._logged, now), now
        if speed is not None:
            scalars["summary/samples_per_second"] = speed
        of_epoch = num_train(trainer)
        if of_epoch is not None and self._samples:
            scalars["summary/epoch"] = self._samples / of_epoch
        log_scalars(trainer, scalars, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Collective: the losses since the last logged step are those of all ranks."""
        return {"samples": self._samples, "loss": self._loss.state(self._device)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict


def _mean_over_ranks(losses: tuple[Tensor, int] | None, world_size: int, device: torch.device) -> float | None:
    """The mean loss of all ranks' micro-batches, skipped ones left out. A collective."""
    total, count = losses or (torch.zeros((), device=device), 0)
    pair = torch.stack([total.float(), torch.tensor(float(count), device=total.device)])
    if world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(pair)
    loss_sum, loss_count = pair.tolist()
    return loss_sum / loss_count if loss_count else None
