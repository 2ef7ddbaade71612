"""The gradient noise scale: about the batch size up to which a larger batch saves steps.

What is logged, by tag:

- ``summary/noise_scale``: tr(S) / |G|^2 in samples (McCandlish et al. 2018), from unbiased estimates that are averaged
  over the observed steps before they are divided. Left out while no signal can be told from the noise.
- ``summary/noise_scale_of_batch``: the same over the batch in use. Far above 1 a larger batch still pays almost in
  full; far below 1 it is wasted.
- ``noise_scale/<layer>``: of the layers asked for, each by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lbzoo.callbacks.gradient_stats import StatisticsCallback
from lbzoo.callbacks.log_values import log_layers
from lbzoo.callbacks.optimizer_view import check_layers, matching, short_names
from lbzoo.callbacks.trainer_view import TrainerView, at_least_one, is_logged, steps_done
from lbzoo.gsnr import GradientStats
from lbzoo.registry import register_callback


@register_callback("noise_scale", needs_gradient_stats=True)
class NoiseScale(StatisticsCallback):
    """Gradient noise scale in samples (the critical batch size), and against the batch in use.

    Works with any optimizer. Needs two gradients a step: ranks times accumulated micro-batches.

    Args:
        every: optimizer steps between logged ones.
        observe_every: optimizer steps between those that go into the averages; gradients are collected in these.
        layers: globs of layers to log by themselves (parameter names without the task's ``model.``).
    """

    def __init__(self, *, every: int = 50, observe_every: int = 10, layers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.every, self.observe_every, self.layers = at_least_one(every), at_least_one(observe_every), tuple(layers)
        self._stats: GradientStats | None = None
        self._batch = 0
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self._shared.stats.noise_state()} if self._shared is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("noise")

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        """A glob that matches no layer fails before a step is made."""
        check_layers(pl_module, self.layers)
        super().on_train_start(trainer, pl_module)
        if self._restored is not None and self._shared is not None:
            self._shared.stats.load_noise_state(self._restored)
            self._restored = None

    def is_needed(self, step: int) -> bool:
        return step % self.observe_every == 0 or is_logged(step, self.every)

    def measure(self, trainer: TrainerView, stats: GradientStats) -> None:
        # In a trainer that does not say, the samples of a micro-batch are known from the second step on.
        self._stats = stats if stats.micro_batch_size is not None else None
        if self._stats is not None:
            stats.observe_noise()
            self._batch = stats.samples

    def after_step(self, trainer: TrainerView) -> None:
        if self._stats is None or not is_logged(steps_done(trainer), self.every):
            return
        scale = self._stats.noise_scale()
        scalars = {"summary/noise_scale": scale, "summary/noise_scale_of_batch": scale / self._batch}
        shown = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
        layers = {}
        if self.layers:
            by_layer = self._stats.noise_scale_per_layer()
            names, values = short_names(list(by_layer)), torch.tensor(list(by_layer.values()))
            chosen = matching(names, self.layers)
            layers = {"noise_scale": ([names[index] for index in chosen], values[chosen])}
        log_layers(trainer, layers, trainer.global_step, scalars=shown)
