"""The base of every task: a LightningModule with model, loss and metrics that is given its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[nn.Module], Optimizer]


class Task(LightningModule):
    """Model, loss and metrics of one problem. It names no optimizer and does not use ``self.trainer``.

    A task implements ``training_step(batch, batch_idx)``, which returns the loss (a mean over the micro-batch's items),
    ``validation_step``, which updates metrics, and ``on_validation_epoch_end``, which logs them once as ``val/...``,
    equal on every rank. ``monitor`` names the one that tells a better checkpoint from a worse, ``mode`` which way.

    Constructors take keyword-only options. ``num_classes`` and ``input_shape`` are filled from the data's facts where
    the recipe leaves them out.
    """

    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[Literal["min", "max"]] = "min"

    _optimizer_factory: OptimizerFactory | None = None
    _lr_multiplier: Callable[[int], float] | None = None

    def bind(self, optimizer_factory: OptimizerFactory, lr_multiplier: Callable[[int], float]) -> None:
        """Set what trains this task.

        ``optimizer_factory`` is called with the task when training starts, after it was moved and wrapped;
        ``lr_multiplier(t)`` scales every group's learning rate at optimizer step t = 1, 2, ...
        """
        self._optimizer_factory = optimizer_factory
        self._lr_multiplier = lr_multiplier

    def configure_optimizers(self) -> Any:
        multiplier = self._lr_multiplier
        if self._optimizer_factory is None or multiplier is None:
            raise RuntimeError(f"{type(self).__name__} has no optimizer: call bind(optimizer_factory, lr_multiplier)")
        optimizer = self._optimizer_factory(self)
        # torch counts steps from 0. A plain function, so that the scheduler's state holds no schedule.
        scheduler = LambdaLR(optimizer, lambda done: multiplier(done + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
