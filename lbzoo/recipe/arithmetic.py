"""The sums behind a stage: accumulation on some machine, virtual shards, and the others spelled out as text."""

from __future__ import annotations

from dataclasses import dataclass

from lbzoo import scaling
from lbzoo.errors import UsageError
from lbzoo.recipe.resolved import Stage


@dataclass(frozen=True)
class BatchSum:
    """global = micro x devices x nodes x accumulation, on some machine.

    ``accumulation`` is None where that is not whole, ``problem`` then says which sizes are; or where the micro-batch is
    yet to be found.
    """

    where: str
    device: str
    devices: int
    num_nodes: int
    accumulation: int | None
    problem: str = ""


def batch_sum(stage: Stage, *, where: str, device: str, devices: int, num_nodes: int) -> BatchSum:
    try:
        accumulation = scaling.accumulation(
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            world_size=devices * num_nodes,
        )
    except UsageError as error:
        return BatchSum(where, device, devices, num_nodes, None, str(error))
    if stage.finds_micro_batch_size:
        return BatchSum(where, device, devices, num_nodes, None)
    return BatchSum(where, device, devices, num_nodes, accumulation)


@dataclass(frozen=True)
class Shards:
    """The virtual shards that samples are drawn from without replacement, one for each micro-batch of a step.

    ``rotating`` samples are in no shard in a given epoch; they are others in the next.
    """

    count: int
    samples: int
    rotating: int


def shards(stage: Stage) -> Shards:
    count = stage.global_batch_size // stage.micro_batch_size
    return Shards(count, stage.num_train // count, stage.num_train % count)


def steps_arithmetic(stage: Stage) -> str:
    """``ceil(90 epochs x 1,281,167 / 32,768)``; empty where the recipe itself says steps."""
    if stage.epochs is None:
        return ""
    return f"ceil({stage.epochs:g} epochs x {stage.num_train:,} / {stage.global_batch_size:,})"


def lr_arithmetic(stage: Stage) -> str:
    """``0.005 x sqrt(32,768 / 512)``; empty where nothing is scaled."""
    rule = stage.lr_scaling
    if rule is None or stage.lr_before_scaling is None:
        return ""
    ratio = f"{stage.global_batch_size:,} / {rule.base_global_batch_size:,}"
    return f"{stage.lr_before_scaling:g} x " + (f"sqrt({ratio})" if rule.rule == "sqrt" else ratio)
