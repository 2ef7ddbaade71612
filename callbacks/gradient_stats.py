"""One GradientStats for all callbacks and optimizers of a training, which collects in the steps that somebody needs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import Optimizer

from lbzoo.callbacks.optimizer_view import unwrap
from lbzoo.callbacks.trainer_view import TrainerView, coming_step, samples_in
from lbzoo.errors import UsageError
from lbzoo.gsnr import GradientStats, attached_stats

IsNeeded = Callable[[int], bool]  # in an optimizer step, from 1


class SharedStats:
    """The statistics of the model in training. ``stats`` was there already, or ends with the training."""

    def __init__(self, stats: GradientStats, *, is_ours: bool) -> None:
        self.stats = stats
        self._is_ours = is_ours
        self._needs: list[IsNeeded] = []
        self._step: int | None = None

    def need(self, is_needed: IsNeeded) -> None:
        """Collect in the steps for which ``is_needed`` holds."""
        self._needs.append(is_needed)

    def attach(self, optimizer: Optimizer) -> None:
        """Give the statistics to an optimizer that takes any, unless it has its own."""
        bare = unwrap(optimizer)
        if hasattr(bare, "attach_stats"):
            own: GradientStats | None = getattr(bare, "gradient_stats", None)
            if own is None or not own.is_attached:
                bare.attach_stats(self.stats)
            self.need(lambda step: True)

    def begin_step(self, step: int) -> None:
        """Before the first backward pass of optimizer step ``step``; called by everybody, done once."""
        if step != self._step and self._is_ours:
            self._step = step
            if any(is_needed(step) for is_needed in self._needs):
                self.stats.resume()
            else:
                self.stats.pause()

    def end(self) -> None:
        if self._is_ours:
            self.stats.detach()


_shared: weakref.WeakKeyDictionary[nn.Module, SharedStats] = weakref.WeakKeyDictionary()


def share_stats(trainer: TrainerView, *, groups: int | None = None) -> SharedStats:
    """The statistics of the model that ``trainer`` trains, made if there are none; optimizers that need them get them.

    Raises UsageError where ``groups`` is not that of the statistics that are there.
    """
    model = _trained_model(trainer)
    shared = _shared.get(model)
    existing = attached_stats(model)
    if shared is None or shared.stats is not existing:
        stats = existing or GradientStats(model, groups=groups, micro_batches=trainer.accumulate_grad_batches)
        shared = _shared[model] = SharedStats(stats, is_ours=existing is None)
        for optimizer in trainer.optimizers:
            shared.attach(optimizer)
    if groups is not None and shared.stats.groups != groups:
        raise UsageError(
            f"the gradients are pooled into groups={shared.stats.groups} already: name the callback that says "
            f"groups={groups} before the others that use GradientStats"
        )
    return shared


def _trained_model(trainer: TrainerView) -> nn.Module:
    return trainer.model if trainer.model is not None else trainer.lightning_module


class StatisticsCallback(Callback):
    """Base of the callbacks that use the shared statistics. A subclass says in which steps, and what it does then.

    ``groups``: the k to pool the gradients to; None leaves it to the micro-batches.
    """

    groups: int | None = None

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._shared: SharedStats | None = None
        self._measured_step = 0
        self._has_warned = False

    def is_needed(self, step: int) -> bool:
        """Whether the gradients of optimizer step ``step`` (from 1) are to be measured."""
        raise NotImplementedError

    def measure(self, trainer: TrainerView, stats: GradientStats) -> None:
        """The gradients of a step are complete. On every rank."""
        raise NotImplementedError

    def after_step(self, trainer: TrainerView) -> None:
        """After an optimizer step whose gradients were measured. On every rank."""

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._forget()
        self._shared = share_stats(trainer, groups=self.groups)
        self._shared.need(self.is_needed)
        self._shared.begin_step(coming_step(trainer))

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = coming_step(trainer)
        if self._shared is None or step == self._measured_step or not self.is_needed(step):
            return
        stats = self._shared.stats
        if stats.num_gradients >= 2:
            self._measured_step = step
            self.measure(trainer, stats)
        elif stats.num_gradients and not self._has_warned:  # none at all: the step is left out (divergence.py)
            self._has_warned = True
            warnings.warn(
                f"{type(self).__name__} logs nothing: {stats.num_gradients} gradient a step has no variance: "
                "accumulate micro-batches (a smaller micro_batch_size, accumulate_grad_batches), or use more ranks",
                UserWarning,
                stacklevel=1,
            )

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._shared is None:
            return
        if self._shared.stats.micro_batch_size is None:
            self._shared.stats.micro_batch_size = samples_in(batch) or None
        if self._measured_step and self._measured_step < coming_step(trainer):
            self._measured_step = 0
            self.after_step(trainer)
        self._shared.begin_step(coming_step(trainer))

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._shared is not None:
            self._shared.end()
        self._forget()


class StatsForOptimizers(StatisticsCallback):
    """Gives the optimizers of a training that need gradient statistics theirs. ``micro_batch_size``: samples."""

    def __init__(self, *, micro_batch_size: int | None = None) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size

    def is_needed(self, step: int) -> bool:
        """The optimizers say for themselves when they need them."""
        return False

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if any(hasattr(unwrap(optimizer), "attach_stats") for optimizer in trainer.optimizers):
            super().on_train_start(trainer, pl_module)
        stats = attached_stats(_trained_model(trainer))
        if stats is not None and stats.micro_batch_size is None:
            stats.micro_batch_size = self.micro_batch_size
