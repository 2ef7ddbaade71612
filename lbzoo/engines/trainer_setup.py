"""How a Lightning Trainer is set up for a recipe: devices, what is left to the engine, and where its counters stand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import ClusterEnvironment

from lbzoo.engines.launch import World
from lbzoo.engines.sharded_strategy import ShardedStrategy
from lbzoo.recipe import ResolvedRecipe

# What the engine does itself, or says in its own words.
QUIET: Mapping[str, Any] = {
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def hardware(recipe: ResolvedRecipe, world: World) -> dict[str, Any]:
    """The Trainer's arguments for devices, strategy and precision."""
    settings = recipe.trainer
    strategy: Any = "auto"
    if settings.strategy == "fsdp":
        strategy = ShardedStrategy(world, settings)
    elif world.world_size > 1:
        strategy = pl.strategies.DDPStrategy(
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # running statistics are averaged when they are needed, not rank 0's taken
            process_group_backend=None,
        )
    return {
        "accelerator": "gpu" if world.accelerator == "cuda" else "cpu",
        "devices": world.devices,
        "num_nodes": world.num_nodes,
        "strategy": strategy,
        "precision": settings.precision,
        "plugins": [_Joined(world)],
    }


class _Joined(ClusterEnvironment):
    """The process group that is there already (distributed.py), in Lightning's words."""

    creates_processes_externally = True
    main_address, main_port = "", 0  # only for making one

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world.world_size

    def global_rank(self) -> int:
        return self._world.rank

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        return self._world.rank // self._world.devices

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...


def set_counters(trainer: pl.Trainer, step: int, accumulate: int) -> None:
    """Make ``trainer.global_step`` and the validation interval count from ``step``.

    These counters are what Lightning restores from a checkpoint of its own.
    """
    loop = trainer.fit_loop.epoch_loop
    steps: Any = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = step
    batches: Any = loop.batch_progress.total
    batches.ready = batches.started = batches.processed = batches.completed = step * accumulate
    loop._batches_that_stepped = step
    # Signals are ours. Lightning's handlers broadcast, amid other collectives, and leave with 1; before every
    # micro-batch it broadcasts a flag and reads it back from the device.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without the remarks that do not apply: the loader's workers, the samplers, the devices are chosen here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
