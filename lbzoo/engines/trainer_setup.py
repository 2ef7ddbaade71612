"""How a Lightning Trainer is set up for a recipe: devices, what is left to the engine, and where its counters stand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment

from lbzoo.engines.launch import World
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
    if world.world_size > 1:
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
        "plugins": [_environment(world)],
    }


def _environment(world: World) -> ClusterEnvironment:
    """``distributed.start`` has set torchrun's variables, under SLURM too."""
    return TorchElasticEnvironment() if world.launched_by else LightningEnvironment()


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
    # Lightning broadcasts a flag and reads it back from the device before every micro-batch; signals are ours.
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
