"""Runs of whole recipes on the ranks of a test; apart from the tests, so that worker processes can import them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lbzoo.checkpoint import CheckpointFolder, load_weights
from lbzoo.engines.launch import World
from lbzoo.engines.run_folder import RunFolder
from lbzoo.engines.stage_run import Start
from lbzoo.engines.stages import train
from lbzoo.recipe import ResolvedRecipe, build_data, build_task, load_recipe

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train_recipe(path: Path, overrides: list[str], folder: Path) -> int:
    """Train a recipe on the ranks of the process group (one, where there is none) into the run folder ``folder``."""
    recipe = load_recipe(path, overrides)
    world = _world()
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if world.launched_by is not None:
        dist.barrier()
        values = (world.rank, world.world_size, world.rank, world.world_size, "localhost", 29400)
        os.environ.update({name: str(value) for name, value in zip(VARIABLES, values, strict=True)})
    try:
        sources = {stage.name: build_data(stage) for stage in recipe.stages}
        return train(recipe, sources, world, RunFolder(folder), Start()).step
    finally:
        for name in VARIABLES:
            os.environ.pop(name, None)


def weights(recipe: ResolvedRecipe, folder: Path, step: int) -> dict[str, Tensor]:
    """What a run has saved of its module, in the type it was trained in."""
    module = build_task(recipe.stages[-1])
    if recipe.trainer.precision == "64-true":
        module = module.double()
    load_weights(CheckpointFolder(folder / "checkpoints").step_path(step), module)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _world() -> World:
    torch.set_num_threads(1)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World("cpu", 1, 1)
    return World("cpu", dist.get_world_size(), 1, dist.get_rank(), dist.get_rank(), "torchrun")
