"""FSDP2 and HSDP as a strategy of Lightning's.

Lightning's own ModelParallelStrategy leaves the sharding to the module, knows one mesh, refuses float64, and reduces
the gradients of every micro-batch. Its checkpoints and its way of starting processes are not needed here.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from lightning.fabric.utilities.types import ReduceOp
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lbzoo.callbacks.optimizer_view import parameters
from lbzoo.engines.launch import World
from lbzoo.engines.sharded_model import shard, without_reduction
from lbzoo.recipe.schema import TrainerSettings
from lbzoo.sharding import clip_grad_norm_
from lbzoo.tasks.base import Task


class ShardedStrategy(ParallelStrategy):
    """Shards a :class:`Task` by its policy in the process group that is there already."""

    is_distributed = True  # asked by the Trainer

    def __init__(self, world: World, settings: TrainerSettings) -> None:
        super().__init__()
        self._world, self._settings = world, settings

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    def setup(self, trainer: pl.Trainer) -> None:
        """Shards before anything is moved to the device, so that no rank ever has the whole model on its own."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        task = self.lightning_module
        assert isinstance(task, Task)
        shard(task, self._world, self._settings)
        self.model = self.precision_plugin.convert_module(task)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        # torch's clip_grad_norm_ makes an all_reduce a parameter.
        self.precision_plugin.clip_grad_by_norm = _clip_grad_by_norm  # type: ignore[method-assign]

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)  # what is not FSDP2's: metrics

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        assert self.model is not None
        with without_reduction(self.model):
            yield

    def barrier(self, name: str | None = None) -> None:
        dist.barrier()

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    def teardown(self) -> None:
        """The shards stay on the device: the next stage starts from them, and gathers them there."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def _clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
    clip_grad_norm_(parameters(optimizer), clip_val)
