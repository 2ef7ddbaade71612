"""Models with their optimizers on several layouts, saved and loaded; importable by worker processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lbzoo.checkpoint import load_checkpoint, save_checkpoint
from lbzoo.engines.launch import World
from lbzoo.engines.sharded_model import shard
from lbzoo.gsnr import GradientStats
from lbzoo.optim import create_optimizer
from lbzoo.recipe.schema import FsdpSettings, TrainerSettings
from lbzoo.sharding import is_sharded
from lbzoo.tasks.base import Task

State = dict[str, Any]


class Layered(Task):
    """A convolution in channels_last, BatchNorm, and a layer with fewer rows than there are ranks."""

    fsdp_layers = ("Sequential",)

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(2, 5, 3).to(memory_format=torch.channels_last)
        self.features = nn.Sequential(convolution, nn.BatchNorm2d(5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return out.square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)


def build(layout: str, optimizer: str, seed: int) -> tuple[Layered, Optimizer]:
    """``layout``: whole (as under DDP), fsdp, or hsdp in groups of two."""
    torch.manual_seed(seed)
    task = Layered()
    if layout != "whole":
        size, rank = dist.get_world_size(), dist.get_rank()
        fsdp = FsdpSettings(shard_size=2 if layout == "hsdp" else None)
        shard(task, World("cpu", size, 1, rank, rank, "torchrun"), TrainerSettings(strategy="fsdp", fsdp=fsdp))
    return task, create_optimizer(task, optimizer, lr=0.01)


def save(layout: str, optimizer: str, path: Path) -> State:
    """Train some steps and save; everything that was saved, in whole tensors."""
    warnings.simplefilter("ignore")
    task, opt = build(layout, optimizer, seed=1)
    train(task, opt)
    save_checkpoint(path, task, opt, {"step": 3})
    return everything(task, opt)


def load(layout: str, optimizer: str, path: Path) -> State:
    """What another model and optimizer hold after loading."""
    task, opt = build(layout, optimizer, seed=2)
    load_checkpoint(path, task, opt)
    return everything(task, opt)


def train(task: Task, optimizer: Optimizer) -> None:
    """Three steps of four micro-batches, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    replicated = dist.get_world_size() > 1 and not is_sharded(task.head.weight)
    model = DistributedDataParallel(task) if replicated else task
    if hasattr(optimizer, "attach_stats"):
        optimizer.attach_stats(GradientStats(model))
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            (model(torch.randn(4, 2, 6, 6, generator=generator)) / 4).backward()
        optimizer.step()


def everything(task: Task, optimizer: Optimizer) -> State:
    model, state = get_state_dict(task, optimizer, options=StateDictOptions(full_state_dict=True))
    values = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, entry in state["state"].items():
        values |= {f"state.{name}.{key}": value for key, value in entry.items()}
    for index, group in enumerate(state["param_groups"]):
        values |= {f"group{index}.{key}": value for key, value in group.items()}
    return values
