"""The gradient signal-to-noise ratio of every layer, of the gradients that the micro-batches of a step have.

What is logged, by tag (a layer is a parameter tensor):

- ``gsnr/<layer>``: the mean over its elements of mean^2 / variance over the k gradients of the step.
- ``summary/gsnr_{p10,p50,p90}``: over the chosen layers. ``hist/gsnr``: the distribution of log10 of the layers.
- ``summary/gsnr_at_gamma``: the share of all elements that VRGD would scale by gamma, the least.
- ``summary/gsnr_gradients``: k; ``summary/gsnr_samples``: the samples of each of them. The GSNR grows with the samples:
  it is about that many times the GSNR of single samples (VRGD, eq. 2).
- ``summary/gsnr_noise_floor``: the mean of gradients that are nothing but noise, 1 / (k - 3), from k = 4 on.
- ``summary/generalization_ratio``: what a small SGD step gains on new data over its gain on this batch (VRGD, eq. 4).

Nothing is logged of a step whose gradients are not finite.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from lightning.pytorch import LightningModule

from lbzoo.callbacks.gradient_stats import StatisticsCallback
from lbzoo.callbacks.log_values import log_histogram, log_layers
from lbzoo.callbacks.optimizer_view import check_layers, matching, short_names
from lbzoo.callbacks.trainer_view import TrainerView, at_least_one, is_logged
from lbzoo.errors import UsageError
from lbzoo.gsnr import GradientStats
from lbzoo.registry import register_callback

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


@register_callback("gsnr", needs_gradient_stats=True)
class Gsnr(StatisticsCallback):
    """Gradient signal-to-noise ratio of every layer, and what VRGD and generalisation theory make of it.

    Works with any optimizer. Needs two gradients a step, better eight: ranks times accumulated micro-batches. In steps
    that are not logged nothing is collected, unless the optimizer needs it.

    Args:
        every: optimizer steps between logged ones.
        layers: globs of layer names (parameter names without the task's ``model.``).
        groups: pool the micro-batches into so many gradients (a multiple of the ranks), for VR optimizers as well.
        gamma: of ``summary/gsnr_at_gamma``.
        histogram: log the distribution over the layers (TensorBoard).
    """

    def __init__(
        self,
        *,
        every: int = 50,
        layers: tuple[str, ...] = ("*",),
        groups: int | None = None,
        gamma: float = 0.1,
        histogram: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise UsageError(f"callback gsnr: gamma must be from 0 to 1, got {gamma}")
        self.every, self.layers, self.groups = at_least_one(every), tuple(layers), groups
        self.gamma, self.histogram = gamma, histogram
        self._scalars: dict[str, float] = {}
        self._layers: tuple[list[str], torch.Tensor] = ([], torch.zeros(0))

    def is_needed(self, step: int) -> bool:
        return is_logged(step, self.every)

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        """A glob that matches no layer fails before a step is made."""
        check_layers(pl_module, self.layers)
        super().on_train_start(trainer, pl_module)

    def measure(self, trainer: TrainerView, stats: GradientStats) -> None:
        ratio = stats.generalization_ratio()
        if not math.isfinite(ratio):  # an overflow, for which a GradScaler skips the step, or no gradient at all
            self._scalars, self._layers = {}, ([], torch.zeros(0))
            return
        means, shares = stats.mean_gsnr_per_layer(), stats.share_at(self.gamma)
        sizes = torch.tensor([float(stats.parameter(name).numel()) for name in means])
        table = torch.stack([torch.stack(list(means.values())), torch.stack(list(shares.values()))]).cpu()
        k = stats.num_gradients
        self._scalars = {
            "summary/gsnr_at_gamma": float((table[1] * sizes).nansum() / sizes.sum()),
            "summary/gsnr_gradients": float(k),
            "summary/generalization_ratio": ratio,
        }
        if k > 3:
            self._scalars["summary/gsnr_noise_floor"] = 1 / (k - 3)
        if stats.micro_batch_size is not None:
            self._scalars["summary/gsnr_samples"] = stats.samples / k
        names = short_names(list(means))
        chosen = matching(names, self.layers)  # of those that have a gradient in this step
        self._layers = ([names[index] for index in chosen], table[0][chosen])

    def after_step(self, trainer: TrainerView) -> None:
        names, values = self._layers
        finite = values[values.isfinite()].double().numpy()
        if finite.size:
            numbers = np.quantile(finite, list(_QUANTILES.values()))
            self._scalars |= {f"summary/gsnr_{q}": float(n) for q, n in zip(_QUANTILES, numbers, strict=True)}
        log_layers(trainer, {"gsnr": (names, values)}, trainer.global_step, scalars=self._scalars)
        if self.histogram:
            log_histogram(trainer, "hist/gsnr", np.log10(finite[finite > 0]), trainer.global_step)
