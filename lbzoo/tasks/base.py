"""The base of every task: a LightningModule with model, loss and metrics that is given its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[nn.Module], Optimizer]


class Task(LightningModule):
    """Model, loss and metrics of one problem. It names no optimizer and does not use ``self.trainer``.

    A task implements ``training_step(batch, batch_idx)``, which returns the loss (a mean over the micro-batch's items),
    ``validation_step``, which updates metrics, and ``on_validation_epoch_end``, which logs them once as ``val/...``,
    equal on every rank. ``monitor`` names the one that tells a better checkpoint from a worse, ``mode`` which way.

    The loss of a step is the mean over the items of the **global** batch. Where all micro-batches hold as many
    (images) that is the mean of their losses, and nothing has to be done. Where they do not (tokens, masked
    positions) a task implements ``count_items`` and takes its means with :meth:`mean_over_items`.

    Constructors take keyword-only options. ``num_classes`` and ``input_shape`` are filled from the data's facts where
    the recipe leaves them out.
    """

    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[Literal["min", "max"]] = "min"

    fsdp_layers: ClassVar[tuple[str, ...]] = ()
    """Globs on the classes of the modules that FSDP gathers one at a time and activation checkpointing computes anew.

    The outermost that match; everything else is one more unit. A recipe may say otherwise (``trainer.fsdp.layers``).
    """

    shared_weights: ClassVar[tuple[str, ...]] = ()
    """How the names of those weights begin that all tasks on the same network have, whatever their heads.

    From a checkpoint or stage of another such task one starts with these, which must all be there in the same shapes,
    and with whatever else fits. None named: ``--init-from`` takes checkpoints of the very same model.
    """

    _optimizer_factory: OptimizerFactory | None = None
    _lr_multiplier: Callable[[int], float] | None = None

    items_per_micro_batch: Mapping[str, float] | None = None
    """Of each kind of item, the mean over the micro-batches of the coming step, of all ranks. Set by the engine."""

    def bind(self, optimizer_factory: OptimizerFactory, lr_multiplier: Callable[[int], float]) -> None:
        """Set what trains this task.

        ``optimizer_factory`` is called with the task when training starts, after it was moved and wrapped;
        ``lr_multiplier(t)`` scales every group's learning rate at optimizer step t = 1, 2, ...
        """
        self._optimizer_factory = optimizer_factory
        self._lr_multiplier = lr_multiplier

    @property
    def loss_reads_weights(self) -> bool:
        """Whether ``training_step`` reads parameters outside the forward pass of their layers, as an L2 term does."""
        return False

    def configure_optimizers(self) -> Any:
        multiplier = self._lr_multiplier
        if self._optimizer_factory is None or multiplier is None:
            raise RuntimeError(f"{type(self).__name__} has no optimizer: call bind(optimizer_factory, lr_multiplier)")
        optimizer = self._optimizer_factory(self)
        # torch counts steps from 0. A plain function, so that the scheduler's state holds no schedule.
        scheduler = LambdaLR(optimizer, lambda done: multiplier(done + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def log_validation(self, values: Mapping[str, float | Tensor]) -> None:
        """Log what a validation came to, as ``val/...``, from ``on_validation_epoch_end``; equal on every rank."""
        # sync_dist changes nothing, and keeps Lightning from warning that they may differ.
        self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)

    def count_items(self, batch: Any) -> dict[str, int | Tensor]:
        """The items in a micro-batch, by kind, whose number differs from one micro-batch to the next.

        A loss of several means has several kinds: ``{"masked": ..., "pairs": ...}``. Every micro-batch counts the same
        kinds. The engine asks ahead of the step, while ``batch`` is still on the CPU.
        """
        return {}

    def mean_over_items(self, total: Tensor, kind: str, batch: Any) -> Tensor:
        """A micro-batch's part of a mean over the global batch's items: ``total``, the sum over its own, divided.

        The divisor is the global batch's number of items over its number of micro-batches, so that the mean of what the
        micro-batches return is the mean over all items, and its gradient theirs, however they fall into micro-batches.
        In a loop that does not count ahead it is the micro-batch's own number. No items at all: ``total`` over 1.
        """
        if self.items_per_micro_batch is not None:
            return total / (self.items_per_micro_batch[kind] or 1.0)
        count = self.count_items(batch)[kind]
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
