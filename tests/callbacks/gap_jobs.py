"""What each rank does in the tests of the generalisation gap with several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from plain_trainer import fit, tensorboard
from rank_jobs import Joined
from torch import Tensor
from torch.utils.data import DataLoader

from lbzoo.callbacks.generalization_gap import GeneralizationGap
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.data.sampling import EvalSampler, StreamSampler
from lbzoo.tasks.image_classification import ImageClassification

SAMPLES, TRAIN, VAL = 25, 32, 14
GLOBAL, MICRO = 8, 2


class Trained(ImageClassification):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(model="lenet", num_classes=10, input_shape=(1, 28, 28))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return torch.randn(count, 1, 28, 28, generator=generator) + labels[:, None, None, None], labels


def train(folder: Path, steps: int = 6) -> None:
    """Four micro-batches a step, on as many ranks as there are."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sampler = StreamSampler(num_samples=TRAIN, global_batch_size=GLOBAL, micro_batch_size=MICRO, seed=0, steps=steps,
                            rank=rank, world_size=world_size)  # fmt: skip
    evaluated = EvalSampler(num_samples=VAL, micro_batch_size=MICRO, rank=rank, world_size=world_size)
    several = {"devices": world_size, "strategy": DDPStrategy(), "plugins": [Joined()]} if world_size > 1 else {}
    task = Trained()
    validation = DataLoader(TensorSamples(*images(VAL, 2)), batch_sampler=evaluated, collate_fn=as_batch)  # type: ignore[arg-type,var-annotated]
    task.val_dataloader = lambda: validation  # type: ignore[method-assign]
    fit(
        task,
        GeneralizationGap(samples=SAMPLES),
        logger=tensorboard(folder / f"rank{rank}"),
        loader=DataLoader(TensorSamples(*images(TRAIN, 1)), batch_sampler=sampler, collate_fn=as_batch),  # type: ignore[arg-type]
        max_steps=steps,
        accumulate_grad_batches=GLOBAL // MICRO // world_size,
        val_check_interval=3 * (GLOBAL // MICRO // world_size),
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        precision="64-true",
        **several,
    )
