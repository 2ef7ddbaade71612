"""The ``trainer`` that modules and callbacks find in the accelerate engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available, _sync_ddp_if_available
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lbzoo.callbacks.optimizer_view import parameters
from lbzoo.engines.logged_values import LoggedValues
from lbzoo.errors import LbzooError
from lbzoo.sharding import clip_grad_norm_

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from lbzoo.engines.launch import World


class NotInThisEngine(LbzooError, AttributeError):
    """Something of Lightning's Trainer that the accelerate engine has not. ``getattr`` with a default takes it."""


class LoopTrainer:
    """``callbacks.trainer_view.TrainerView``, what LightningModule's own methods need, and a little more.

    Anything else that is asked for raises NotInThisEngine, which names it.
    """

    # Of Lightning's arguments, those that cannot be had here; built-in callbacks and LightningModule ask for them.
    barebones = fast_dev_run = False
    sanity_checking = testing = predicting = False
    max_epochs = min_epochs = min_steps = progress_bar_callback = None
    gradient_clip_algorithm: str | None = None  # by norm

    def __init__(
        self,
        module: pl.LightningModule,
        world: World,
        device: torch.device,
        *,
        loggers: Sequence[Logger] = (),
        callbacks: Sequence[pl.Callback] = (),
        step: int = 0,
        first_step: int = 0,
        max_steps: int = -1,
        accumulate_grad_batches: int = 1,
        gradient_clip_norm: float | None = None,
        log_every: int = 50,
        default_root_dir: str = ".",
    ) -> None:
        self.lightning_module = module
        self.model: nn.Module = module
        self.loggers, self.callbacks = list(loggers), list(callbacks)
        self.global_step, self.first_step, self.max_steps = step, first_step, max_steps
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_norm
        self.log_every_n_steps = log_every
        self.default_root_dir = default_root_dir
        self.world_size, self.num_devices, self.num_nodes = world.world_size, world.devices, world.num_nodes
        self.global_rank, self.local_rank = world.rank, world.local_rank
        self.current_epoch = 0
        self.should_stop = False
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.train_dataloader: Any = None
        self.val_dataloaders: Any = None
        self.num_training_batches = 0
        self.num_val_batches: list[int | float] = []
        self.state = TrainerState(fn=TrainerFn.FITTING, stage=RunningStage.TRAINING)
        self.strategy = _Strategy(device, world)
        self.precision_plugin = _Precision()
        self._logged = LoggedValues(self.loggers, every=log_every)
        self._accelerator_connector = _IsDistributed(world.world_size > 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotInThisEngine(
            f"trainer.{name} is not there with trainer.engine=accelerate, which has the attributes of TrainerView "
            "(callbacks/trainer_view.py) and a little more (docs/engines.md); a callback or module that needs a whole "
            "Trainer runs with trainer.engine=lightning"
        )

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def training(self) -> bool:
        return self.state.stage == RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        return self.state.stage == RunningStage.VALIDATING

    @property
    def estimated_stepping_batches(self) -> int:
        """The ``global_step`` at which training ends."""
        return self.max_steps

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of everything that was logged."""
        return self._logged.newest("callback")

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return self._logged.newest("log")

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self._logged.newest("pbar")

    @property
    def _results(self) -> Any:  # LightningModule.log writes to it
        return self._logged.results

    @property
    def _logger_connector(self) -> LoggedValues:  # LightningModule.log asks it
        return self._logged


@dataclass(frozen=True)
class _IsDistributed:
    is_distributed: bool


@dataclass
class _Precision:
    """What callbacks and ``LightningModule.clip_gradients`` use of a precision plugin."""

    scaler: GradScaler | None = None

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, gradient_clip_algorithm: str = "norm") -> None:
        if not clip_val or clip_val <= 0:
            return
        if str(gradient_clip_algorithm) == "value":
            torch.nn.utils.clip_grad_value_(parameters(optimizer), clip_val)
        else:
            clip_grad_norm_(parameters(optimizer), clip_val)


@dataclass(eq=False)
class _Strategy:
    """What LightningModule and callbacks use of a strategy: where things are, and sums over the ranks."""

    root_device: torch.device
    world: World
    step: Callable[[Optimizer, Callable[[], Any]], Any] | None = None
    _lightning_optimizers: list[LightningOptimizer] = field(default_factory=list)  # LightningModule.optimizers() asks

    def attach(self, optimizer: Optimizer) -> None:
        """Have ``optimizer`` stepped by ``self.step(optimizer, closure)`` when the module steps it."""
        wrapped = LightningOptimizer._to_lightning_optimizer(optimizer, self)  # type: ignore[arg-type]  # it calls optimizer_step alone
        self._lightning_optimizers = [wrapped]

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **_: Any) -> Any:
        assert self.step is not None
        return self.step(optimizer, closure)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        total = int(self.reduce(votes, reduce_op="sum"))
        return total == self.world.world_size if all else total > 0

    def barrier(self, name: str | None = None) -> None:
        if self.world.world_size > 1:
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        objects = [obj]
        if self.world.world_size > 1:
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return _all_gather_ddp_if_available(tensor, group, sync_grads)
