"""What every run needs inside a training loop: seeds, restoring, validation, checkpoints, stopping by signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from lbzoo.checkpoint import load_checkpoint, save_checkpoint
from lbzoo.engines.run_folder import RunFolder
from lbzoo.engines.running_statistics import average_running_statistics
from lbzoo.engines.seeding import seed_micro_batch
from lbzoo.engines.sharded_model import free_gathered_weights
from lbzoo.engines.signals import StopRequested, StopSignals
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

    Comes after ``average``, the run's averages of the weights.
    """

    def __init__(self, checkpoint: Path | None, stage_steps_done: int, average: AverageWeights | None = None) -> None:
        self._checkpoint, self._done, self._average = checkpoint, stage_steps_done, average

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checkpoint is None:
            return
        averages = self._average.complete() if self._average is not None else None
        load_checkpoint(self._checkpoint, pl_module, trainer.optimizers[0], averages)
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


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """The scalars of the last validation, by tag."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


@dataclass
class Best:
    """The best value of the task's monitored metric so far, and the step it was reached at."""

    monitor: str
    mode: str
    value: float | None = None
    step: int | None = None

    def update(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this validation is the best so far."""
        value = metrics.get(self.monitor)
        if value is None or value != value:
            return False
        better = self.value is None or (value > self.value if self.mode == "max" else value < self.value)
        if better:
            self.value, self.step = value, step
        return better


class Checkpointer(Callback):
    """Saves at every ``every_steps`` steps, at each new best, at the stage's last step, and when a signal asks.

    A checkpoint of a step at which validation is due is written after that validation, so that a resumed run owes
    nothing; only a run that was told to stop before its stage's last step saves at once, and says so in
    ``validation_owed``.

    Args:
        run: where to.
        last_step: the stage's last optimizer step, counted over the whole run.
        every_steps: optimizer steps between saves.
        validate_every: optimizer steps between validations.
        keep_last: newest checkpoints to keep.
        save_best: whether to keep the best one as well.
        best: of the run so far.
        metrics: of the run's last validation.
        describe: the part of ``state.json`` that does not change from save to save, for a given step.
        signals: asked at the end of each step.
        average: the averages of the weights, which are saved along.
        before_save: called with the step; what it raises keeps a diverged state from being saved.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        last_step: int,
        every_steps: int,
        validate_every: int,
        keep_last: int,
        save_best: bool,
        best: Best,
        metrics: dict[str, float],
        describe: Callable[[int], dict[str, Any]],
        signals: StopSignals,
        average: AverageWeights | None = None,
        before_save: Callable[[int], None] | None = None,
    ) -> None:
        self._run = run
        self._last_step, self._every_steps, self._validate_every = last_step, every_steps, validate_every
        self._keep_last, self._save_best = keep_last, save_best
        self.best, self.metrics = best, metrics
        self._describe = describe
        self._signals = signals
        self._average, self._before_save = average, before_save
        self._stop = 0  # the signal that the run was asked to stop by

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        validation_due = self._validation_due(step)
        self._stop = self._stop or self._signals.agreed()
        if step >= self._last_step:
            trainer.should_stop = True  # Lightning validates before it stops, whatever the interval
        elif self._stop:
            self._save(trainer, pl_module, validation_owed=validation_due)
            raise StopRequested(self._stop)
        elif self._save_due(step) and not validation_due:
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        self.metrics = validation_metrics(trainer)
        is_best = self.best.update(self.metrics, step) and self._save_best
        if is_best or self._save_due(step) or trainer.should_stop:  # its last step, or where a callback ends it
            self._save(trainer, pl_module, is_best=is_best)
        if self._stop:
            raise StopRequested(self._stop)

    def _validation_due(self, step: int) -> bool:
        return step % self._validate_every == 0 or step >= self._last_step

    def _save_due(self, step: int) -> bool:
        return step % self._every_steps == 0

    def _save(
        self, trainer: Trainer, module: LightningModule, *, is_best: bool = False, validation_owed: bool = False
    ) -> None:
        step = trainer.global_step
        if self._before_save is not None:
            self._before_save(step)
        average_running_statistics(module)
        state = {
            **self._describe(step),
            "metrics": self.metrics,
            "best": {"monitor": self.best.monitor, "value": self.best.value, "step": self.best.step},
            "validation_owed": validation_owed,
        }
        for logger in trainer.loggers:
            logger.save()  # what is logged up to here is part of the state
        folder = self._run.checkpoints
        averages = self._average.complete() if self._average is not None else None
        save_checkpoint(folder.step_path(step), module, trainer.optimizers[0], state, averages)
        if trainer.is_global_zero:
            folder.link("last", step)
            if is_best:
                folder.link("best", step)
            folder.clear(keep_last=self._keep_last)
            self._run.write_status("running", step=step, metrics=self.metrics, best=state["best"])
