"""The process group of a run, and saying the same thing on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lbzoo.engines.launch import World

T = TypeVar("T")


@contextmanager
def process_group(world: World, *, also_alone: bool = False) -> Iterator[None]:
    """Join the process group and leave it in the end; one that is there already is used, and stays.

    A world of one has none unless ``also_alone``: FSDP2 needs a group even so. GPUs get a CPU back-end beside NCCL:
    flags and file names travel without touching the device.
    """
    if dist.is_initialized() or (world.world_size == 1 and not also_alone):
        yield
        return
    if world.launched_by == "slurm":
        _set_variables_from_slurm(world)
    options: dict[str, Any] = {}
    if world.world_size == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if world.accelerator == "cuda":
        torch.cuda.set_device(world.local_rank)
        options["device_id"] = torch.device("cuda", world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if world.accelerator == "cuda" else "gloo", **options)
    try:
        yield
    finally:
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
