"""When a run is saved, and what becomes of a run that a signal asks to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lbzoo.checkpoint import BackgroundSaver, content_of, write
from lbzoo.engines.callback_states import states_of
from lbzoo.engines.run_folder import RunFolder
from lbzoo.engines.running_statistics import average_running_statistics
from lbzoo.engines.signals import StopRequested, StopSignals
from lbzoo.engines.weight_average import AverageWeights
from lbzoo.errors import CheckpointError

log = logging.getLogger(__name__)


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """The scalars of the last validation, by tag: the module's, and those of callbacks that have some."""
    own = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    of_callbacks: list[Mapping[str, float]] = [
        getattr(callback, "validation_results", {})
        for callback in trainer.callbacks  # type: ignore[attr-defined]  # both engines' trainers have it
    ]
    return {**own, **{name: float(value) for results in of_callbacks for name, value in results.items()}}


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
        stateful: callbacks whose state is saved along.
        in_background: writes while the training goes on; None to wait for it.
        warn: go on where a checkpoint cannot be written.
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
        stateful: Sequence[Callback] = (),
        in_background: BackgroundSaver | None = None,
        warn: bool = False,
        average: AverageWeights | None = None,
        before_save: Callable[[int], None] | None = None,
    ) -> None:
        self._run = run
        self._last_step, self._every_steps, self._validate_every = last_step, every_steps, validate_every
        self._keep_last, self._save_best = keep_last, save_best
        self.best, self.metrics = best, metrics
        self._describe = describe
        self._signals, self._stateful = signals, stateful
        self._in_background, self._warn = in_background, warn
        self._average, self._before_save = average, before_save
        self._stop = 0  # the signal that the run was asked to stop by

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.saves = True

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

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._in_background is not None:
            self._in_background.wait_until_copied()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._in_background is not None:
            self._in_background.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._in_background is not None:
            self._in_background.close()

    def _save(
        self, trainer: Trainer, module: LightningModule, *, is_best: bool = False, validation_owed: bool = False
    ) -> None:
        step = trainer.global_step
        if self._before_save is not None:
            self._before_save(step)
        average_running_statistics(module)
        best = {"monitor": self.best.monitor, "value": self.best.value, "step": self.best.step}
        state = {**self._describe(step), "metrics": self.metrics, "best": best, "validation_owed": validation_owed,
                 "stage_over": trainer.should_stop}  # fmt: skip
        averages = self._average.complete() if self._average is not None else None
        content = content_of(module, trainer.optimizers[0], state, averages, states_of(self._stateful))
        for logger in trainer.loggers:
            logger.save()  # what is logged up to here is part of the state
        path, saver = self._run.checkpoints.step_path(step), self._in_background

        def then() -> None:
            self._written(step, state, is_best=is_best)

        if saver is None:
            self._attempt(lambda: write(path, content, then=then), trainer)
            return
        self._attempt(saver.wait, trainer)  # the one before
        self._attempt(lambda: saver.save(path, module, content, then), trainer)
        if self._stop or trainer.should_stop:  # nothing comes after this one
            self._attempt(saver.wait, trainer)

    def _attempt(self, save: Callable[[], None], trainer: Trainer) -> None:
        """What cannot be written ends the run, or is said; on all ranks alike."""
        try:
            save()
        except CheckpointError as error:
            if not self._warn:
                raise
            if trainer.is_global_zero:
                log.warning("%s; the training goes on (checkpoint.on_error: warn)", error)

    def _written(self, step: int, state: Mapping[str, Any], *, is_best: bool) -> None:
        """On the first rank, once the checkpoint is there."""
        folder = self._run.checkpoints
        folder.link("last", step)
        if is_best:
            folder.link("best", step)
        folder.clear(keep_last=self._keep_last)
        self._run.write_status("running", step=step, metrics=state["metrics"], best=state["best"])
