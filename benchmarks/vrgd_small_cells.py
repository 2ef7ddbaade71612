"""What a run of ``vrgd_small.py`` is: its settings, the training loop, and the two controls.

Every run is a cell of a grid: an optimizer, a variant, a global batch size and a seed. Its settings come from
``recipes/vrgd_resnet_digits.yaml`` by the overrides of :meth:`Cell.overrides`, so ``lbzoo fit`` with the same overrides
trains the same weights (tests/models/test_vrgd_small.py); here a plain loop does it, which starts faster. The variants:

``base``        the optimizer.
``vr``          its VR form: gradients times r, the clipped and normalised GSNR of each element (for Adam and LAMB, its
                average over the steps).
``lower_lr``    the optimizer at the learning rate times the mean of r over all elements and steps of the cell's ``vr``.
``permuted``    the VR form with the GSNR permuted within each tensor, by one permutation for the whole run: the same
                values of r, also over time, on the wrong elements.

Weights and sampling order follow from the seed alone, so that variants can be compared seed by seed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

import lbzoo
from lbzoo import scaling
from lbzoo.data.rng import stable_rng
from lbzoo.data.sampling import StreamSampler
from lbzoo.optim.vr import Statistics, VarianceReduced
from lbzoo.recipe import build_data, build_schedule, build_task, load_recipe, optimizer_factory
from lbzoo.tasks.base import Task

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "vrgd_resnet_digits.yaml"
GRADIENTS = 8  # k, at every batch size
BASE_BATCH = 64  # the learning rates are tuned here
BATCHES = (64, 256, 512, 1408)  # the last is the largest multiple of 64 in the 1437 training images
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
SWEEP_SEEDS = (0, 1, 2)
SWEEP_FACTORS = (0.0625, 0.25)  # times the scaled learning rate, at the largest batch
VARIANTS = ("base", "vr", "lower_lr", "permuted")  # in the order in which a cell needs them
PERCENT = 100.0

# As is usual, layer-wise adaptation leaves out biases and batch normalisation.
NOT_ADAPTED = {"param_rules": [{"match": ["*.bias", "*.bn?.weight"], "adapt": False}]}


@dataclass(frozen=True)
class BaseOptimizer:
    """A base optimizer: its options, and the learning rates that are tried first at BASE_BATCH."""

    options: Mapping[str, Any]
    learning_rates: tuple[float, ...]


OPTIMIZERS = {
    "momentum": BaseOptimizer({"momentum": 0.9, "weight_decay": 0.0}, (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)),
    "adam": BaseOptimizer({"weight_decay": 0.0}, (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)),
    "lamb": BaseOptimizer({"weight_decay": 0.0, **NOT_ADAPTED}, (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)),
    "lars": BaseOptimizer(
        {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.02, **NOT_ADAPTED},
        (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run. ``base_lr`` belongs to BASE_BATCH; ``lr_factor`` multiplies the learning rate scaled from it."""

    optimizer: str
    variant: str
    global_batch_size: int
    seed: int
    base_lr: float
    lr_factor: float = 1.0

    @property
    def lr(self) -> float:
        """The peak learning rate: square-root scaling from BASE_BATCH."""
        sizes = {"base_global_batch_size": BASE_BATCH, "global_batch_size": self.global_batch_size}
        return self.lr_factor * scaling.scaled_lr(self.base_lr, rule="sqrt", **sizes)

    @property
    def is_vr(self) -> bool:
        return self.variant in ("vr", "permuted")

    def overrides(self) -> list[str]:
        """The recipe's values that make it this run."""
        values = {
            "seed": self.seed,
            "data.global_batch_size": self.global_batch_size,
            "data.micro_batch_size": self.global_batch_size // GRADIENTS,
            "optimizer.name": ("vr_" if self.is_vr else "") + self.optimizer,
            "optimizer.lr": self.lr,
            **{f"optimizer.{option}": value for option, value in OPTIMIZERS[self.optimizer].options.items()},
        }
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def train(cell: Cell, changes: Sequence[str] = ()) -> tuple[Task, dict[str, Any]]:
    """The trained task, and what was measured. ``changes`` are further overrides of the recipe."""
    recipe = load_recipe(RECIPE, [*cell.overrides(), *changes])
    (stage,) = recipe.stages
    begin = time.process_time()
    torch.manual_seed(recipe.seed)
    task = build_task(stage)
    task.bind(optimizer_factory(stage), build_schedule(stage))
    configured = task.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    factors = attach_statistics(task, optimizer, cell) if cell.is_vr else None

    data = build_data(stage)
    samples = data.train_dataset(seed=recipe.seed)
    sampler = StreamSampler(
        num_samples=len(samples),
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        seed=recipe.seed,
        steps=stage.steps,
    )
    task.train()
    for step in range(stage.steps):
        for shard in sampler.shards:
            batch = samples.__getitems__(sampler.micro_batch(step, shard))
            (task.training_step(batch, shard) / sampler.num_shards).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    train_accuracy, train_loss = evaluate(task, *samples.tensors)
    test_accuracy, test_loss = evaluate(task, *data.val_dataset().tensors)
    return task, {
        "steps": stage.steps,
        "lr": cell.lr,
        "train_accuracy": train_accuracy,
        "train_loss": train_loss,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "mean_r": None if factors is None else factors.mean,
        "kept_length": None if factors is None else factors.kept_length,
        "cpu_seconds": round(time.process_time() - begin, 2),
    }


@torch.no_grad()
def evaluate(task: Task, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy in percent, cross-entropy without smoothing), in evaluation mode."""
    task.eval()
    logits = torch.cat([task(part) for part in images.split(512)]).double()
    accuracy = PERCENT * (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, torch.nn.functional.cross_entropy(logits, labels).item()


def attach_statistics(task: Task, optimizer: VarianceReduced, cell: Cell) -> Factors:
    """Give a VR optimizer the statistics of its variant, and watch what it makes of them."""
    stats: Statistics = lbzoo.GradientStats(task)
    optimizer.attach_stats(Permuted(stats, cell.seed) if cell.variant == "permuted" else stats)
    return Factors(optimizer)


class Permuted:
    """Statistics whose GSNR is permuted within each tensor, by one permutation for as long as this object lives.

    Normalising by the tensor's mean, clipping, and averaging over the steps all commute with it, so the factors r are
    those of the true statistics, on other elements.
    """

    def __init__(self, stats: Statistics, seed: int) -> None:
        self.stats, self.seed = stats, seed
        self._orders: dict[Tensor, Tensor] = {}

    @property
    def num_gradients(self) -> int:
        return self.stats.num_gradients

    def require(self, parameters: Sequence[Tensor]) -> int:
        return self.stats.require(parameters)

    def take_gsnr(self, parameter: Tensor) -> Tensor:
        values = self.stats.take_gsnr(parameter)
        if parameter not in self._orders:
            order = stable_rng(self.seed, len(self._orders)).permutation(parameter.numel())
            self._orders[parameter] = torch.from_numpy(order)
        # In place, since the layout of the memory (channels last) has to stay.
        return values.copy_(values.reshape(-1)[self._orders[parameter]].view(values.shape))

    def reset(self) -> None:
        self.stats.reset()


class Factors:
    """What a VR optimizer multiplies its gradients by, as the optimizer inside sees it."""

    def __init__(self, optimizer: VarianceReduced) -> None:
        self.means: list[float] = []
        self.kept_lengths: list[float] = []
        self.last: list[Tensor] = []
        self._given: list[tuple[Tensor, Tensor]] = []
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(self._remember)
        optimizer.base.register_step_pre_hook(self._compare)

    @property
    def mean(self) -> float:
        """Over all elements that had a gradient, and over the steps."""
        return statistics.fmean(self.means)

    @property
    def kept_length(self) -> float:
        """|r g| / |g| over the whole network, mean over the steps."""
        return statistics.fmean(self.kept_lengths)

    def _remember(self, *_: Any) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        self._given = [(param, param.grad) for param in params if param.grad is not None]

    def _compare(self, *_: Any) -> None:
        before, after = [given for _, given in self._given], [param.grad for param, _ in self._given]
        self.kept_lengths.append((get_total_norm(after) / get_total_norm(before)).item())
        self.last = [(param.grad / given).reshape(-1) for param, given in self._given]  # 0 / 0 is NaN
        self.means.append(torch.cat(self.last).nanmean().item())
