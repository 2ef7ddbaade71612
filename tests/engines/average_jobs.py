"""Jobs for the ranks of test_weight_average.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lbzoo.checkpoint import load_checkpoint, save_checkpoint
from lbzoo.engines.weight_average import WeightAverage
from lbzoo.sharding import whole

Layout = Literal["plain", "ddp", "fsdp"]
Weights = dict[str, Tensor]


class Network(nn.Module):
    """A layer that is a unit of its own under FSDP2, and weights of odd sizes that stay with the root."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


class Training:
    """A network in one of the layouts, its optimizer and its averages."""

    def __init__(self, layout: Layout, *, seed: int = 0) -> None:
        self.module = Network(seed).double()
        if layout == "fsdp":
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.module.first, mesh=mesh)
            fully_shard(self.module, mesh=mesh)
        self.model = DistributedDataParallel(self.module) if layout == "ddp" else self.module
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.3, momentum=0.9)
        self.average = WeightAverage(self.module, decay=0.9)

    def train(self, steps: range, *, validate: bool = False) -> None:
        """On two samples a step, which two ranks share. ``validate``: a forward pass with the averages after each."""
        for step in steps:
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            share = x if dist.get_world_size() == 1 else x[dist.get_rank()].unsqueeze(0)
            self.optimizer.zero_grad()
            self.model(share).square().mean().backward()
            self.optimizer.step()
            self.average.update(step)
            if validate:
                self.average.exchange()
                with torch.no_grad():
                    self.model(share)
                self.average.exchange()

    def weights(self) -> tuple[Weights, Weights]:
        """(trained, averaged), whole on every rank."""
        trained = {name: whole(weight.detach()).clone() for name, weight in self.module.named_parameters()}
        return trained, {name: whole(average).clone() for name, average in self.average.averages.items()}


def train(layout: Layout, steps: int, validate: bool) -> tuple[Weights, Weights]:
    training = Training(layout)
    training.train(range(1, steps + 1), validate=validate)
    return training.weights()


def save(layout: Layout, steps: int, path: Path) -> None:
    training = Training(layout)
    training.train(range(1, steps + 1))
    save_checkpoint(path, training.module, training.optimizer, {}, training.average.averages)


def resume(layout: Layout, path: Path, steps: range) -> tuple[Weights, Weights]:
    training = Training(layout, seed=5)
    load_checkpoint(path, training.module, training.optimizer, training.average.averages)
    training.train(steps)
    return training.weights()
