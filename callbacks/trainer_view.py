"""The narrow view of a trainer that lbzoo's callbacks have, and the few facts they derive from it.

A Lightning ``Trainer`` has this shape (mypy checks it: callbacks take a ``TrainerView`` where Lightning passes a
``Trainer``). Any other training loop that provides an object of this shape, and calls the hooks in Lightning's order,
can drive the callbacks:

``on_train_start``, then for every micro-batch (``on_before_optimizer_step`` when its gradients complete a global batch:
after unscaling and before clipping) and ``on_train_batch_end``, and ``on_train_end``; around a validation
``on_validation_start`` and ``on_validation_end``, with the results in ``callback_metrics`` by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.optim import Optimizer

from lbzoo.errors import UsageError


class TrainerView(Protocol):
    """What a callback may touch. Steps are optimizer steps.

    A trainer whose ``global_step`` does not start at 0 because earlier stages of the same run came before it has the
    attribute ``first_step`` as well: the ``global_step`` at which its own stage began.
    """

    @property
    def global_step(self) -> int:
        """Optimizer steps done (over all optimizers, where a module has several)."""

    @property
    def max_steps(self) -> int:
        """The ``global_step`` at which training ends; -1 where something else ends it."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of one rank in one optimizer step."""

    @property
    def optimizers(self) -> Sequence[Optimizer]: ...

    @property
    def loggers(self) -> Sequence[Logger]: ...

    @property
    def callback_metrics(self) -> Mapping[str, Tensor]:
        """The newest value of everything that the module logged."""

    @property
    def model(self) -> torch.nn.Module | None:
        """The module as it is trained, wrapped for its strategy."""

    @property
    def lightning_module(self) -> LightningModule:
        """The module without the strategy's wrapper."""

    @property
    def train_dataloader(self) -> Any: ...

    @property
    def num_val_batches(self) -> Sequence[int | float]:
        """Validation batches of this rank, one number a data loader."""

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def world_size(self) -> int: ...

    @property
    def sanity_checking(self) -> bool: ...


def is_logged(step: int, every: int) -> bool:
    """Whether optimizer step ``step`` (1-based) is logged: the first, and each whose number ``every`` divides."""
    return step == 1 or step % every == 0


def at_least_one(every: int) -> int:
    """An ``every`` that a user gave, checked."""
    if every < 1:
        raise UsageError(f"every: a number of optimizer steps, at least 1, not {every}")
    return every


def steps_done(trainer: TrainerView) -> int:
    """Optimizer steps since the run began. Lightning counts the steps of all optimizers; this is one optimizer's."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def coming_step(trainer: TrainerView) -> int:
    """The 1-based number of the optimizer step that ``on_before_optimizer_step`` announces."""
    return steps_done(trainer) + 1


def steps_done_in_stage(trainer: TrainerView) -> int:
    """Optimizer steps since this stage began (for a run without stages: since the run began)."""
    return steps_done(trainer) - int(getattr(trainer, "first_step", 0))


def total_steps(trainer: TrainerView) -> int | None:
    """The ``global_step`` at which training ends; None where nothing says."""
    limits = (trainer.max_steps, getattr(trainer, "estimated_stepping_batches", math.inf))
    known = [int(limit) for limit in limits if 0 < limit < math.inf]
    return min(known) if known else None


def num_train(trainer: TrainerView) -> int | None:
    """Samples of one epoch: the length of the training data set; None for a stream without one."""
    try:
        return len(trainer.train_dataloader.dataset) or None
    except (AttributeError, TypeError):
        return None


def samples_in(batch: Any) -> int:
    """Samples of a micro-batch: the first dimension of the first tensor in it; 0 where it holds none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, Mapping | Sequence) and not isinstance(batch, str | bytes):
        return next((count for count in map(samples_in, parts) if count), 0)
    return 0


def loss_scale(trainer: TrainerView, optimizer: Optimizer) -> float:
    """The factor on the gradients in ``on_before_optimizer_step``.

    1, but for fp16 with an optimizer that divides by the loss scale in its own step (torch's fused ones). Reads a
    device tensor: ask on logged steps only.
    """
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
