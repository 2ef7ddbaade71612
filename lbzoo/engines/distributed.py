"""The process group of a run, and saying the same thing on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lbzoo.engines.launch import World

T = TypeVar("T")


def start(world: World) -> None:
    """Join the process group; nothing for a world of one.

    GPUs get a CPU back-end beside NCCL: flags and file names travel without touching the device.
    """
    if world.world_size == 1 or dist.is_initialized():
        return
    if world.launched_by == "slurm":
        _set_variables_from_slurm(world)
    if world.accelerator == "cuda":
        torch.cuda.set_device(world.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", world.local_rank))
    else:
        dist.init_process_group("gloo")


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its value on every rank; what it raises is raised on every rank."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # carried to the other ranks, which would wait for ever
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast("T", outcome[0])


def _set_variables_from_slurm(world: World) -> None:
    """What torchrun would have set, so that everything below looks in one place."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    # Of two jobs on one node, each needs a port of its own; a job's tasks know its number.
    job = os.environ.get("SLURM_JOB_ID", "0")
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(15000 + int(job) % 10000))
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.devices),
        GROUP_RANK=str(world.rank // world.devices),
    )
