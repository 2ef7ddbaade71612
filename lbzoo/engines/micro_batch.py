"""``micro_batch_size: auto``: the largest micro-batch that fits into the memory of every GPU of the run.

Tried are the sizes that divide a device's share of the global batch, each by training the stage's own model for two
steps on its own first samples: doubled until one does not fit, then halved in between. A trial runs on every rank by
itself, without communication, so that one rank may run out of memory and none waits for it; what the run will hold
beside model, gradients and optimizer is set aside meanwhile.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

from lbzoo.data.base import DataSource
from lbzoo.data.loader import train_loader
from lbzoo.engines.launch import World
from lbzoo.engines.stages import build_module
from lbzoo.errors import LbzooError
from lbzoo.optim import get_optimizer_info
from lbzoo.ranks import has_other_ranks
from lbzoo.recipe import ResolvedRecipe, Stage
from lbzoo.recipe.planning import collects_gradient_stats, model_size

Fits = Callable[[int], bool]  # of a micro-batch size; the same answer on every rank

# Left to NCCL, cuDNN and fragmentation, and to batches that are longer than the first ones.
_MEMORY_SHARE = 0.9
# VRGD: fewer gradients a step than 8 tell little of their variance.
_GRADIENTS_WANTED = 8


def find_micro_batch_sizes(
    recipe: ResolvedRecipe,
    sources: Mapping[str, DataSource],
    world: World,
    make_fits: Callable[[ResolvedRecipe, Stage, DataSource, World], Fits] | None = None,
) -> dict[str, int]:
    """By stage, for those that say ``auto``: the largest size that fits. Collective: all ranks find the same.

    Raises LbzooError where not even the smallest fits.
    """
    make_fits = make_fits or trial
    sizes = {}
    for stage in recipe.stages:
        if stage.finds_micro_batch_size:
            candidates = candidate_sizes(recipe, stage, world.world_size)
            found = largest_fitting(candidates, make_fits(recipe, stage, sources[stage.name], world))
            if found is None:
                raise LbzooError(
                    f"stage {stage.name}: training does not fit into the memory of this device with micro-batches of "
                    f"{candidates[0]} {'sample' if candidates[0] == 1 else 'samples'}, the smallest that divide the "
                    "global batch; use a smaller model, activation_checkpointing, bf16-mixed, or strategy: fsdp"
                )
            sizes[stage.name] = found
    return sizes


def candidate_sizes(recipe: ResolvedRecipe, stage: Stage, world_size: int) -> list[int]:
    """The micro-batch sizes that make whole steps and have a shard of the data each, in increasing order.

    Where gradient statistics are collected a step has at least two micro-batches, for an optimizer that needs them
    eight, if the global batch allows it.
    """
    share = stage.global_batch_size // world_size
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    counts = {size: stage.global_batch_size // size for size in divisors}
    needs_gradients = get_optimizer_info(stage.optimizer.name).needs_gradient_stats
    wanted = _GRADIENTS_WANTED if needs_gradients else 2 if collects_gradient_stats(recipe, stage) else 1
    shardable = [size for size in divisors if counts[size] <= stage.num_train]
    return [size for size in shardable if counts[size] >= wanted] or shardable[:1]


def largest_fitting(candidates: Sequence[int], fits: Fits) -> int | None:
    """The largest of the increasing ``candidates`` that fits, if whatever is smaller than one that fits does too.

    Each try at least doubles the size until one fails; those between the last two are then halved.
    """
    last = len(candidates) - 1
    fit, misfit, index = -1, len(candidates), 0
    while fit < last and misfit > last:
        if fits(candidates[index]):
            fit = index
            index = next((i for i, size in enumerate(candidates) if size >= 2 * candidates[fit]), last)
        else:
            misfit = index
    while misfit - fit > 1:
        middle = (fit + misfit) // 2
        fit, misfit = (middle, misfit) if fits(candidates[middle]) else (fit, middle)
    return candidates[fit] if fit >= 0 else None


def trial(recipe: ResolvedRecipe, stage: Stage, source: DataSource, world: World) -> Fits:
    """Whether a stage trains with micro-batches of a size on the devices of the run; all ranks agree on it."""
    device = torch.device(world.accelerator)
    set_aside = _bytes_beside_training(recipe, stage, world)

    def fits(size: int) -> bool:
        with _limited_memory(device):
            fitted = True
            try:
                _train_a_little(recipe, stage, source, world, size, set_aside)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                fitted = False
        return _all_ranks(fitted)

    return fits


def _train_a_little(
    recipe: ResolvedRecipe, stage: Stage, source: DataSource, world: World, size: int, set_aside: int
) -> None:
    """Two steps: in the second backward pass gradients and optimizer state are there as they will be."""
    device = torch.device(world.accelerator)
    module, precision = build_module(recipe, stage), _precision(recipe, device)
    precision.convert_module(module)
    module.to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    reserved = torch.empty(set_aside, dtype=torch.uint8, device=device)
    batch = precision.convert_input(move_data_to_device(_first_batch(recipe, stage, source, world, size), device))
    passes = min(stage.global_batch_size // (size * world.world_size), 2)
    for _ in range(2):
        for index in range(passes):
            with precision.forward_context(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*self.log.*")  # nobody listens
                loss = module.training_step(batch, index)
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        if not get_optimizer_info(stage.optimizer.name).needs_gradient_stats:  # else its state is set aside
            optimizer.step()
        optimizer.zero_grad()
    del reserved


def _first_batch(recipe: ResolvedRecipe, stage: Stage, source: DataSource, world: World, size: int) -> Any:
    """What this rank trains on first, with micro-batches of a size."""
    loader = train_loader(
        source,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=size,
        steps=1,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=0,
    )
    return next(iter(loader))


def _bytes_beside_training(recipe: ResolvedRecipe, stage: Stage, world: World) -> int:
    """What a run holds on a device and a trial does not: averages, squares of gradients, DDP's buckets.

    DDP's buckets stand beside the first gradients, and hold squares as well where those are collected.
    """
    size, _ = model_size(recipe, stage)
    if size is None:
        return 0
    buckets = (size.weight_bytes + size.statistics_bytes) if world.world_size > 1 else 0
    needs_stats = get_optimizer_info(stage.optimizer.name).needs_gradient_stats
    unstepped = (size.optimizer_bytes or 0) if needs_stats else 0
    return size.average_bytes + size.statistics_bytes + buckets + unstepped


def _precision(recipe: ResolvedRecipe, device: torch.device) -> Precision:
    precision = recipe.trainer.precision
    if precision == "64-true":
        return DoublePrecision()
    if precision == "bf16-true":
        return HalfPrecision("bf16-true")
    if precision == "32-true":
        return Precision()
    return MixedPrecision(precision, device.type)


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Less than all of the GPU's memory, all of which is given back in the end."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(_MEMORY_SHARE)
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def _is_out_of_memory(error: Exception) -> bool:
    """cuBLAS and cuDNN have errors of their own for it."""
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _all_ranks(fitted: bool) -> bool:
    if not has_other_ranks():
        return fitted
    flag = torch.tensor(int(fitted))
    dist.all_reduce(flag, dist.ReduceOp.MIN)  # on the CPU's back-end
    return bool(flag)
