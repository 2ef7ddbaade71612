"""What each rank does in the tests of the gsnr and noise_scale callbacks with several processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from plain_trainer import Plain, fit, tensorboard
from rank_jobs import Joined, make_optimizer, micro_batches
from test_trainer_view import OtherTrainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lbzoo.callbacks.gradient_stats import StatsForOptimizers
from lbzoo.callbacks.gsnr import Gsnr
from lbzoo.callbacks.noise_scale import NoiseScale


def callbacks() -> tuple[Any, ...]:
    return Gsnr(every=2), NoiseScale(every=2, observe_every=1, layers=("*",)), StatsForOptimizers(micro_batch_size=4)


def train_alone(folder: Path, name: str, accumulate: int) -> None:
    fit(
        Plain(make_optimizer(name)),
        *callbacks(),
        logger=tensorboard(folder),
        loader=micro_batches(0, 1, accumulate, 4),
        max_steps=4,
        accumulate_grad_batches=accumulate,
        precision="64-true",
    )


def train_ddp(folder: Path, name: str, accumulate: int) -> list[str]:
    """A Lightning Trainer. The files that this rank wrote."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    fit(
        Plain(make_optimizer(name)),
        *callbacks(),
        logger=tensorboard(folder / f"rank{rank}"),
        loader=micro_batches(rank, world_size, accumulate, 4),
        max_steps=4,
        accumulate_grad_batches=accumulate,
        precision="64-true",
        use_distributed_sampler=False,
        devices=world_size,
        strategy=DDPStrategy(),
        plugins=[Joined()],
    )
    return [str(path) for path in (folder / f"rank{rank}").rglob("*") if path.is_file()]


def train_sharded(folder: Path, name: str, accumulate: int) -> list[str]:
    """FSDP2 in a loop of our own."""
    warnings.simplefilter("ignore")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    module = Plain(make_optimizer(name)).double()
    fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    register_fsdp_forward_method(module, "training_step")
    optimizer = module.make_optimizer(module)
    logger = tensorboard(folder / f"rank{rank}")
    batches = [(x.double(), y) for x, y in micro_batches(rank, world_size, accumulate, 4)]
    other = OtherTrainer(module, [optimizer], [logger], batches, accumulate_grad_batches=accumulate, max_steps=4)
    other.is_global_zero, other.world_size = rank == 0, world_size
    other.fit(*callbacks())
    if rank == 0:
        logger.save()
    return [str(path) for path in (folder / f"rank{rank}").rglob("*") if path.is_file()]
