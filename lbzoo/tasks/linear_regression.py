"""Linear regression without a bias: few enough weights to look at each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lbzoo.registry import register_task
from lbzoo.tasks.base import Task


@register_task("linear_regression")
class LinearRegression(Task):
    """y = w x with the mean squared error; w starts at zero.

    A batch is (x [N, dim], y [N]). Validation logs ``val/loss`` and ``val/weight_<i>``, the weights, from 1.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(self, *, input_shape: tuple[int]) -> None:
        super().__init__()
        self.model = nn.Linear(input_shape[0], 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.loss = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        """Predictions [N]."""
        predictions: Tensor = self.model(x).squeeze(1)
        return predictions

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.loss.update(F.mse_loss(self(x), y), len(x))

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        weights = {f"val/weight_{index}": w for index, w in enumerate(self.model.weight[0], start=1)}
        self.log_dict({"val/loss": self.loss.compute(), **weights}, sync_dist=True)
        self.loss.reset()
