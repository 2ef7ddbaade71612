"""The run on the terminal. Only the first rank speaks.

The loss is on the device: it is read when something is shown, about once a second, and is the first rank's own.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lbzoo.callbacks.optimizer_view import learning_rate, unwrap
from lbzoo.callbacks.step_loss import LossSum
from lbzoo.callbacks.terminal import Display, Status, duration_text, open_display, rate_text
from lbzoo.callbacks.throughput import Reading, TrainingClock, samples_per_second, seconds_left
from lbzoo.callbacks.trainer_view import TrainerView, samples_in, steps_done, total_steps
from lbzoo.registry import register_callback


@register_callback("progress")
class Progress(Callback):
    """Optimizer step, samples a second, time left, loss, lr and the last validation: a bar, or lines in a file.

    In a Lightning Trainer of your own it wants ``enable_progress_bar=False``, or there are two. ``line_seconds``:
    between two lines where the output is not a terminal; by default 5 s at first, growing to 60 s.
    """

    def __init__(self, *, line_seconds: float | None = None) -> None:
        self.line_seconds = line_seconds
        self._display: Display | None = None
        self._training = False
        self._begin(step=0, total=None)

    def _begin(self, *, step: int, total: int | None) -> None:
        self._first_step = self._step = step
        self._shown_step: int | None = None
        self._total = total
        self._began = time.monotonic()
        self._clock = TrainingClock()
        self._readings: deque[Reading] = deque([Reading()], maxlen=self._display.smoothing if self._display else 1)
        self._speed: float | None = None
        self._loss = LossSum()  # of the coming step
        self._step_loss: tuple[Tensor, int] | None = None  # of the last one
        self._lr: float | Tensor | None = None
        self._validation: str | None = None
        self._stepping = False
        self._samples = self._micro_batches = 0  # of the coming step

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._open(trainer)
        self._training = True
        self._begin(step=steps_done(trainer), total=total_steps(trainer))

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepping = True
        self._lr = learning_rate(unwrap(optimizer))

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._display is None:
            return
        self._loss.add(outputs, trainer.accumulate_grad_batches)
        self._samples += samples_in(batch) * trainer.world_size
        self._micro_batches += 1
        ended, self._stepping = self._stepping, False
        if ended:
            self._end_step(steps_done(trainer))
        first = ended and self._step == self._first_step + 1
        if first or (self._display.is_due() and (ended or self._display.shows_micro_batches)):
            self._show(trainer)

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._display is not None:
            if self._shown_step != self._step:
                self._show(trainer)
            speed = samples_per_second(Reading(), self._clock.read())
            took = duration_text(time.monotonic() - self._began)
            rate = f", {rate_text(speed)}" if speed else ""
            self._display.say(f"trained {self._step - self._first_step} steps in {took}{rate}")
        self._training = False
        self._close()

    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._open(trainer)
        self._clock.pause()
        self._validation_began = time.monotonic()
        self._validated = 0
        self._show_validation(trainer)

    def on_validation_batch_end(
        self,
        trainer: TrainerView,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validated += 1
        if self._display is not None and self._display.is_due():
            self._show_validation(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._clock.resume()
        if self._display is None or trainer.sanity_checking:
            return
        results = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        texts = {name: f"{name} {value:.4f}" for name, value in results.items()}
        took = duration_text(time.monotonic() - self._validation_began)
        where = f"step {self._step}: " if self._training else ""
        self._display.say(f"{where}{', '.join(texts.values()) or 'validated, no metrics'} ({took})")
        self._validation = texts.get(getattr(pl_module, "monitor", ""), next(iter(texts.values()), None))
        if not self._training:
            self._close()

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        self._training = False
        self._close()

    def teardown(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _end_step(self, step: int) -> None:
        self._step = step
        self._clock.count(self._samples)
        self._step_loss = self._loss.take()
        self._samples = self._micro_batches = 0

    def _show(self, trainer: TrainerView) -> None:
        assert self._display is not None
        self._shown_step = self._step
        now = self._clock.read()
        if now.steps > self._readings[-1].steps:
            self._speed = samples_per_second(self._readings[0], now)
            self._readings.append(now)
        steps_left = None if self._total is None else self._total - self._step
        loss = self._step_loss
        self._display.show(
            Status(
                self._step,
                self._total,
                samples_per_second=self._speed,
                seconds_left=seconds_left(now, steps_left) if steps_left else None,
                loss=None if loss is None else float(loss[0]) / loss[1],
                lr=None if self._lr is None else float(self._lr),
                validation=self._validation,
                micro_batches=(self._micro_batches, trainer.accumulate_grad_batches),
            )
        )

    def _show_validation(self, trainer: TrainerView) -> None:
        if self._display is not None and not trainer.sanity_checking:
            batches = sum(trainer.num_val_batches)
            self._display.validating(self._validated, int(batches) if batches < float("inf") else None)

    def _open(self, trainer: TrainerView) -> None:
        if self._display is None and trainer.is_global_zero:
            self._display = open_display(self.line_seconds)

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None
