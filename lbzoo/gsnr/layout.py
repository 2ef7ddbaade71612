"""How a model is laid out over the ranks: what sees its gradients there, and how many of them make one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lbzoo.errors import UsageError
from lbzoo.gsnr.ddp import DDPBackend
from lbzoo.gsnr.fsdp import FSDPBackend
from lbzoo.gsnr.local import LocalBackend, Switch
from lbzoo.gsnr.sums import GradientSums
from lbzoo.ranks import has_other_ranks
from lbzoo.sharding import data_parallel_ranks, is_sharded, refuse_flat_parameter


class Backend(Protocol):
    """How gradients are seen and their squares added up over the ranks. ``ranks``: those with samples of their own."""

    switch: Switch

    @property
    def ranks(self) -> int: ...

    def finish(self, all_sums: Sequence[GradientSums]) -> None:
        """Complete the sums before they are read, on every rank."""

    def detach(self) -> None:
        """Stop, and leave the model as it was."""


MakeBackend: TypeAlias = Callable[[int], Backend]  # of the size of a pool


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By the names that they have in the model without its wrappers; tied ones once."""
    for name, parameter in _unwrap(model).named_parameters():
        yield name.replace("_orig_mod.", ""), parameter


def _unwrap(model: nn.Module) -> nn.Module:
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def backend_for(model: nn.Module, all_sums: list[GradientSums]) -> tuple[MakeBackend, int]:
    """What makes the back-end, and its number of ranks. Raises UsageError for layouts that cannot be seen."""
    for sums in all_sums:
        refuse_flat_parameter(sums.parameter, sums.name)
    compiled = getattr(model, "_orig_mod", model)
    if isinstance(compiled, DistributedDataParallel):
        ddp = compiled
        return lambda pool: DDPBackend(ddp, all_sums, pool), dist.get_world_size(ddp.process_group)
    sharded = [sums.parameter for sums in all_sums if is_sharded(sums.parameter)]
    if sharded:
        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            raise UsageError("GradientStats: the parameters are sharded, but not by fully_shard (FSDP2)")
        return lambda pool: FSDPBackend(model, all_sums, pool), data_parallel_ranks(sharded)
    if has_other_ranks():
        raise UsageError(
            f"GradientStats was given a bare module in a process group of {dist.get_world_size()} ranks, whose other "
            "gradients it would not see: give it what is trained, the DistributedDataParallel around the module or the "
            "module after fully_shard"
        )
    return lambda pool: LocalBackend(all_sums, pool), 1


def pool_size(groups: int | None, micro_batches: int | None, ranks: int) -> int:
    """How many backward passes of a rank count as one gradient."""
    if groups is None:
        return 1
    if groups % ranks:
        raise UsageError(f"GradientStats: groups={groups} is not a multiple of the {ranks} ranks")
    per_rank = groups // ranks
    if micro_batches is None:
        return 1
    if micro_batches % per_rank:
        raise UsageError(
            f"GradientStats: {micro_batches} micro-batches on each of {ranks} ranks do not make groups={groups}"
        )
    return micro_batches // per_rank
