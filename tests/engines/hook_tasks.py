"""Tasks and callbacks that say what an engine does with them; importable by name from a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from parity_tasks import LayerNormNet
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

calls: list[str] = []  # what was called since the last clear(), in order

OF_BOTH = (
    "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start",
    "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_validation_start", "on_validation_end",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end",
)  # fmt: skip
OF_MODULE = (
    "configure_optimizers", "training_step", "validation_step", "backward", "optimizer_step", "optimizer_zero_grad",
    "configure_gradient_clipping", "lr_scheduler_step", "on_before_batch_transfer", "transfer_batch_to_device",
    "on_after_batch_transfer", "on_validation_model_zero_grad", "on_validation_model_eval", "configure_model",
)  # fmt: skip


def _recorded(owner: type, name: str) -> Callable[..., Any]:
    default = getattr(owner, name)

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_module = isinstance(self, LightningModule)
        step = f" at {self.global_step}" if of_module else f" of callback at {args[0].global_step}"
        calls.append(name + (step if name != "configure_optimizers" else ""))
        return default(self, *args, **kwargs)

    # Lightning looks at the names of these parameters.
    if name in ("training_step", "validation_step"):

        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            return hook(self, batch, batch_idx)

        return step
    return hook


class Recording(LayerNormNet):
    """Records every hook."""


class RecordingCallback(Callback):
    """Records every hook."""


for _name in OF_BOTH + OF_MODULE:
    setattr(Recording, _name, _recorded(LayerNormNet, _name))
for _name in OF_BOTH:
    setattr(RecordingCallback, _name, _recorded(Callback, _name))


class Logging(LayerNormNet):
    """Logs in every way that the engines share."""

    def __init__(self, *, num_classes: int = 3) -> None:
        super().__init__(num_classes=num_classes)
        self.accuracy = MulticlassAccuracy(num_classes)
        self.mean_size = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.log("fit/loss", loss, prog_bar=True)
        self.log("fit/both", loss, on_step=True, on_epoch=True)
        self.log("fit/synced", loss, on_epoch=True, on_step=False, sync_dist=True)
        self.log("fit/max", logits.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("fit/silent", loss, logger=False)
        self.accuracy(logits, y)
        self.log("fit/accuracy", self.accuracy, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("fit/weight", self.model[0].weight.sum())

    def on_train_epoch_end(self) -> None:
        self.log("fit/end", 2.5)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.model(x)
        self.log_dict({"val/loss": F.cross_entropy(logits, y), "val/size": float(len(x))}, sync_dist=True)
        self.mean_size.update(len(x))
        self.log("val/mean_size", self.mean_size)
        return logits

    def on_validation_epoch_end(self) -> None:
        self.log("val/global_step", float(self.global_step), batch_size=1)


class LogsFromCallback(Callback):
    """A callback may log as well."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("callback/largest", outputs["logits"].max())  # type: ignore[attr-defined]  # the engine attaches it


class Curious(LayerNormNet):
    """Uses what a module may use of itself and of the trainer; ``facts`` has the answers."""

    facts: ClassVar[dict[str, Any]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        type(self).facts = {
            "device": self.device,
            "global_step": self.global_step,
            "current_epoch": self.current_epoch,
            "rank": (self.global_rank, self.local_rank, self.trainer.world_size),
            "is_global_zero": self.trainer.is_global_zero,
            "max_steps": self.trainer.max_steps,
            "training": self.trainer.training,
            "lr": [group["lr"] for group in optimizer.param_groups],
            "last_lr": schedule.get_last_lr(),
            "loggers": [type(logger).__name__ for logger in self.loggers],
            "logger": type(self.logger).__name__,
            "gathered": self.all_gather(torch.tensor(1.0)),
            "missing": getattr(self.trainer, "no_such_thing", "default"),
        }
        return super().training_step(batch, batch_idx)


class Manual(LayerNormNet):
    """Manual optimization."""

    def __init__(self, *, num_classes: int = 3) -> None:
        super().__init__(num_classes=num_classes)
        self.automatic_optimization = False


class TwoOptimizers(LayerNormNet):
    """One for each half."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.model[0], self.model[-1])]


class OnPlateau(LayerNormNet):
    """A schedule that follows a metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class LeavesOut(LayerNormNet):
    """Has no loss for every third micro-batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class NoClosure(torch.optim.SGD):
    """Forgets the closure."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


class WantsTheTrainer(Callback):
    """Reads what only Lightning's Trainer has."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert trainer.fit_loop is not None


class StopsEarly(Callback):
    """Ends the training after the third step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 3


class Fails(Callback):
    """Raises in the second step, and sees it."""

    seen: ClassVar[list[str]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 1:
            raise RuntimeError("out of luck")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        type(self).seen.append(str(exception))
