"""What every run needs inside a training loop: seeds, restoring, the right weights and statistics in validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from lbzoo.checkpoint import load_callbacks, load_checkpoint, load_optimizer
from lbzoo.engines.callback_states import restore_states
from lbzoo.engines.running_statistics import average_running_statistics
from lbzoo.engines.seeding import seed_micro_batch
from lbzoo.engines.sharded_model import free_gathered_weights
from lbzoo.engines.weight_average import AverageWeights


class MicroBatchSeeds(Callback):
    """Seeds the generators before each micro-batch from its place in the run (see seeding.py)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        of_rank = trainer.accumulate_grad_batches
        micro_batch = trainer.global_rank * of_rank + batch_idx % of_rank
        seed_micro_batch(self._seed, trainer.global_step, micro_batch)


class Restore(Callback):
    """Loads the checkpoint once model and optimizer stand as they will be trained, and sets the schedule.

    Comes after ``average``, the run's averages of the weights. ``stateful``: the callbacks that get their state back.
    ``optimizer_from``: a checkpoint of the stage before, whose optimizer's state a stage begins with.
    """

    def __init__(
        self,
        checkpoint: Path | None,
        stage_steps_done: int,
        average: AverageWeights | None = None,
        *,
        stateful: Sequence[Callback] = (),
        optimizer_from: Path | None = None,
    ) -> None:
        self._checkpoint, self._done, self._average = checkpoint, stage_steps_done, average
        self._stateful, self._optimizer_from = stateful, optimizer_from

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checkpoint is None:
            if self._optimizer_from is not None:
                load_optimizer(self._optimizer_from, pl_module, trainer.optimizers[0])
            return
        averages = self._average.complete() if self._average is not None else None
        load_checkpoint(self._checkpoint, pl_module, trainer.optimizers[0], averages)
        restore_states(self._stateful, load_callbacks(self._checkpoint))
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            assert isinstance(scheduler, LambdaLR)  # Task.configure_optimizers makes no other
            scheduler.last_epoch, scheduler._step_count = self._done, self._done + 1
            scheduler._last_lr = [
                base * multiplier(self._done)
                for base, multiplier in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = lr


class FreeGatheredWeights(Callback):
    """After a validation under FSDP the parameters are those that are trained again, for all callbacks that follow."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        free_gathered_weights(pl_module)


class AverageStatistics(Callback):
    """Validation is with BatchNorm's statistics of all ranks."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average_running_statistics(pl_module)
