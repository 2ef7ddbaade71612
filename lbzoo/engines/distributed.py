"""The process group of a run, and saying the same thing on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lbzoo.checkpoint import BackgroundSaver
from lbzoo.engines.launch import World
from lbzoo.errors import LbzooError, UsageError
from lbzoo.ranks import has_other_ranks

T = TypeVar("T")

# gloo's words; NCCL's errors have a class.
_LOST = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "imed out", "gloo/transport")


@contextmanager
def process_group(world: World, *, also_alone: bool = False, timeout: float = 1800) -> Iterator[None]:
    """Join the process group and leave it in the end; one that is there already is used, and stays.

    A world of one has none unless ``also_alone``: FSDP2 needs a group even so. GPUs get a CPU back-end beside NCCL:
    flags and file names travel without touching the device. ``timeout``: seconds that a rank waits for another.
    """
    from lightning_utilities.core.rank_zero import rank_zero_only

    setattr(rank_zero_only, "rank", world.rank)  # noqa: B010 (mypy sees no attribute): loggers ask it who writes
    if dist.is_initialized():
        _check_group(world)
        yield
        return
    if world.world_size == 1 and not also_alone:
        yield
        return
    if world.launched_by == "slurm":
        _set_variables_from_slurm(world)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if world.world_size == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if world.accelerator == "cuda":
        torch.cuda.set_device(world.local_rank)
        options["device_id"] = torch.device("cuda", world.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.accelerator == "cuda" else "gloo", **options)
    except (dist.DistError, RuntimeError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LbzooError(
            f"the {world.world_size} processes of the run did not find each other at {place} (this one is rank "
            f"{world.rank}): {str(error).splitlines()[0]}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _check_group(world: World) -> None:
    """Raise UsageError where the group that is there is not the run's: ranks would take themselves for others."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if (size, rank) != (world.world_size, world.rank):
        raise UsageError(
            f"this process is rank {rank} of {size} in torch.distributed, but rank {world.rank} of {world.world_size} "
            "by the recipe and its launcher's variables (RANK, WORLD_SIZE): set trainer.devices and these alike"
        )


def background_saver() -> BackgroundSaver:
    """One whose threads speak to each other in a group of their own, on the CPU. Collective."""
    return BackgroundSaver(dist.new_group(backend="gloo") if dist.is_initialized() else None)


def lost_rank(error: BaseException, timeout: float) -> LbzooError | None:
    """The error of a rank that waited for another which had ended, or did not answer; None for any other."""
    text = str(error)
    if not has_other_ranks() or isinstance(error, OSError):  # of a disk, a pipe or a service
        return None
    if not (isinstance(error, dist.DistError) or any(mark in text for mark in _LOST)):
        return None
    return LbzooError(
        f"another rank has ended, or did not answer within trainer.timeout ({timeout:g} s); the cause is what that one "
        f"says. Go on from the last checkpoint with --resume auto ({text.strip().splitlines()[0][:200]})"
    )


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
