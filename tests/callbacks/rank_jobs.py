"""What each rank does in the tests with several processes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from plain_trainer import Plain, fit, tensorboard
from test_trainer_view import OtherTrainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, TensorDataset

import lbzoo
from lbzoo.callbacks.progress import Progress
from lbzoo.callbacks.train_metrics import TrainMetrics
from lbzoo.callbacks.trust_ratio import TrustRatio


class Joined(ClusterEnvironment):
    """The process group that is there already."""

    creates_processes_externally = True
    main_address, main_port = "localhost", 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...


def micro_batches(rank: int, world_size: int, accumulate: int, steps: int) -> DataLoader[Any]:
    """In step t, micro-batch j of rank r is the block t * k + r * accumulate + j of 4 samples, k blocks a step."""
    generator = torch.Generator().manual_seed(3)
    blocks = steps * world_size * accumulate
    x, y = torch.randn(blocks, 4, 6, generator=generator), torch.randint(3, (blocks, 4), generator=generator)
    samples = torch.arange(blocks * 4).reshape(steps, world_size, accumulate, 4)[:, rank].reshape(-1, 4)
    return DataLoader(TensorDataset(x.flatten(0, 1), y.flatten()), batch_sampler=samples.tolist())


def make_optimizer(name: str) -> Any:
    def make(module: nn.Module) -> torch.optim.Optimizer:
        return lbzoo.create_optimizer(module, name, lr=0.02)

    return make


def train_ddp(folder: Path, name: str, steps: int) -> tuple[str, list[str]]:
    """(what was printed, the files this rank wrote)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = folder / f"rank{rank}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit(
            Plain(make_optimizer(name)),
            TrustRatio(every=2),
            TrainMetrics(every=2),
            Progress(line_seconds=0.0),
            logger=tensorboard(own),
            loader=micro_batches(rank, world_size, 1, steps),
            max_steps=steps,
            precision="64-true",
            use_distributed_sampler=False,
            devices=world_size,
            strategy=DDPStrategy(),
            plugins=[Joined()],
        )
    return printed.getvalue(), [str(path) for path in own.rglob("*") if path.is_file()]


def train_alone(folder: Path, name: str, steps: int, accumulate: int) -> None:
    """The same global batches in one process."""
    fit(
        Plain(make_optimizer(name)),
        TrustRatio(every=2),
        TrainMetrics(every=2),
        logger=tensorboard(folder),
        loader=micro_batches(0, 1, accumulate, steps),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        precision="64-true",
    )


class WithScalar(Plain):
    """Its scale has one element, so that a rank holds an empty shard, and its offset stays whole on every rank."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.scale, self.offset = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x * self.scale) + self.offset, y)


def train_sharded(folder: Path, name: str, steps: int) -> list[str]:
    """FSDP2 (a mesh of one rank where there is only one) under a loop of our own; the same batch on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    module = WithScalar(make_optimizer(name)).double()
    mesh = init_device_mesh("cpu", (world_size,))
    offset = module.offset
    fully_shard(module, mesh=mesh, ignored_params={offset})
    register_fsdp_forward_method(module, "training_step")
    optimizer = module.make_optimizer(module)
    logger = tensorboard(folder / f"rank{rank}")
    batches = [(x.double(), y) for x, y in micro_batches(0, 1, 1, steps)]
    other = OtherTrainer(module, [optimizer], [logger], batches, accumulate_grad_batches=1, max_steps=steps)
    other.is_global_zero, other.world_size = rank == 0, world_size
    other.fit(TrustRatio(every=2), TrainMetrics(every=2))
    if rank == 0:
        logger.save()
    return [str(path) for path in (folder / f"rank{rank}").rglob("*") if path.is_file()]
