"""The gradient noise scale: the batch size at which noise and signal in the gradient are equal.

McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), appendix A.1. Gradients of
two batch sizes give unbiased estimates of |G|^2, G the true gradient, and of tr(S), S the covariance of one sample's
gradient; each is averaged over the steps, and then the ratio taken. Here the small batches are the k gradients of a
step and the large one is all of it, with N samples, and in terms of the summed variance V of the k gradients::

    tr(S) = N V / (k - 1)          |G|^2 = |mean|^2 - V / (k - 1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class NoiseAverages:
    """Moving averages of the two estimates, of each layer. ``decay``: weight of what was, from one step to the next."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._averages: dict[str, Tensor] = {}  # [2]: |G|^2, tr(S)

    def add(self, names: list[str], squared_means: Tensor, variances: Tensor, samples: int, gradients: int) -> None:
        """One step: |mean|^2 and V of each layer [layers], the samples N in all and the gradients k.

        A step whose gradients overflowed, which a GradScaler skips, is left out.
        """
        squared_norms = squared_means - variances / (gradients - 1)
        traces = variances * (samples / (gradients - 1))
        estimates = torch.stack([squared_norms, traces], dim=1).double()
        is_finite = estimates.isfinite().all()  # not read: that would wait for the device
        for name, estimate in zip(names, estimates, strict=True):
            old = self._averages.get(name, torch.zeros_like(estimate))
            # Weights of equal age are equal in both averages, so the ratio needs no correction for the start.
            self._averages[name] = torch.where(is_finite, torch.lerp(estimate, old, self.decay), old)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"steps": self.steps, "averages": dict(self._averages)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.steps = int(state["steps"])
        self._averages = {name: average.to(device) for name, average in state["averages"].items()}

    def per_layer(self) -> dict[str, float]:
        """tr(S) / |G|^2 in samples; infinite where no signal can be told from the noise, NaN where there is neither."""
        if not self._averages:
            return {}
        table = torch.stack(list(self._averages.values())).tolist()
        return {name: _ratio(*row) for name, row in zip(self._averages, table, strict=True)}

    def whole(self) -> float:
        """Of all layers together."""
        total = torch.stack(list(self._averages.values())).sum(0).tolist()
        return _ratio(*total)


def _ratio(squared_norm: float, trace: float) -> float:
    if squared_norm > 0:
        return trace / squared_norm
    return math.inf if trace > 0 else math.nan
