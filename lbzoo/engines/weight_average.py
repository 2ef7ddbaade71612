"""An exponential moving average of the weights, beside the weights that are trained.

At optimizer step t of a stage, counted from 1 and a multiple of ``every_steps`` = n, with x the weights:

    a = d a + (1 - d) x,    d = min(decay, (1 + t) / (10 + t))^n

The second term of the minimum, TensorFlow's, lets the average forget the initial weights: until it reaches ``decay``
the average is over about the last tenth of the steps. Averages are float32 at least, begin as the weights are when a
stage begins, and lie where the weights lie, in shards under FSDP2. BatchNorm's running statistics are averaged as the
weights are that they belong to; other buffers are the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lbzoo.callbacks.trainer_view import TrainerView, steps_done_in_stage
from lbzoo.engines.running_statistics import average_over_ranks, running_statistics
from lbzoo.engines.sharded_model import free_gathered_weights
from lbzoo.precision import at_least_float32
from lbzoo.recipe import EmaSettings
from lbzoo.sharding import local_parts


class WeightAverage:
    """The averages of a module's trained weights and running statistics; ``averages`` holds them by name."""

    @torch.no_grad()
    def __init__(self, module: nn.Module, *, decay: float, every_steps: int = 1) -> None:
        self._module, self._decay, self._every_steps = module, decay, every_steps
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._averaged: dict[str, Tensor] = {**trained, **running_statistics(module)}
        self.averages = {name: at_least_float32(tensor.detach(), copy=True) for name, tensor in self._averaged.items()}
        self._replaced: dict[str, Tensor] = {}  # weights of lower precision, while their averages are in their place

    def decay_at(self, step: int) -> float:
        """d at optimizer step ``step`` of the stage, from 1."""
        return float(min(self._decay, (1 + step) / (10 + step)) ** self._every_steps)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step ``step`` of the stage, from 1."""
        if step % self._every_steps:
            return
        share = 1 - self.decay_at(step)
        alike: tuple[list[Tensor], list[Tensor]] = ([], [])
        for average, weight in zip(*self._parts(), strict=True):
            if average.dtype == weight.dtype:
                alike[0].append(average)
                alike[1].append(weight)
            else:
                average.mul_(1 - share).add_(weight, alpha=share)
        if alike[0]:
            torch._foreach_lerp_(*alike, share)

    def complete(self) -> dict[str, Tensor]:
        """The averages by name. Collective: the ranks have seen different running statistics until here."""
        average_over_ranks([self.averages[name] for name in running_statistics(self._module)])
        return self.averages

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averages in the weights' place, or back. Takes the memory of one tensor more.

        Weights of lower precision cannot hold their averages' values: those are kept until the way back instead.
        """
        free_gathered_weights(self._module)
        for name, average, weight in zip(self.averages, *self._parts(), strict=True):
            if name in self._replaced:
                weight.copy_(self._replaced.pop(name))
            elif average.dtype == weight.dtype:
                before = weight.clone()
                weight.copy_(average)
                average.copy_(before)
            else:
                self._replaced[name] = weight.clone()
                weight.copy_(average)

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of (averages, what they are of)."""
        return local_parts(self.averages.values()), local_parts(self._averaged.values())


class AverageWeights(Callback):
    """Keeps the averages of a stage, and validates with them if the recipe says so.

    Comes before the callbacks that restore and save: those find the averages, and the trained weights in the module.
    """

    def __init__(self, settings: EmaSettings) -> None:
        self._settings = settings
        self._average: WeightAverage | None = None

    def complete(self) -> dict[str, Tensor]:
        """The averages by name, from ``on_fit_start`` on. Collective."""
        assert self._average is not None
        return self._average.complete()

    def on_fit_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        settings = self._settings
        self._average = WeightAverage(pl_module, decay=settings.decay, every_steps=settings.every_steps)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._average is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._average.update(steps_done_in_stage(trainer))

    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._average is not None and self._settings.in_validation:
            self._average.complete()
            self._average.exchange()

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self._average is not None and self._settings.in_validation:
            self._average.exchange()
