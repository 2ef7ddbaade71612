"""Trust ratios of every layer: what a layer-wise optimizer multiplies each layer's direction by.

What is logged, by tag (a layer is a parameter tensor; N: ``every`` optimizer steps):

- ``trust_ratio/<layer>``: |x| / |u|, x the weights before the step, u the direction before scaling. For LANS,
  ``trust_ratio_grad/<layer>`` is that of its gradient part; NovoGrad's ``grad_scale`` is |u| of a unit gradient.
- ``update_ratio/<layer>``: |step| / |x|, the relative change of the layer in this step.
- ``grad_norm/<layer>``: |g|, as the optimizer used it (after clipping; for a measured optimizer, before).
- ``summary/trust_ratio_{min,p10,p50,p90,max}``, ``summary/update_ratio_{p10,p50,p90}``: over the chosen layers.
- ``hist/trust_ratio``: the distribution of log10 of it; ``heatmap/trust_ratio``: layers x time as one image.

An optimizer that publishes ``layer_stats()`` is asked; the step of any other is measured (layer_stats.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from torch.optim import Optimizer

from lbzoo.callbacks.heatmap import History, draw
from lbzoo.callbacks.layer_stats import StatsSource, join, stats_source
from lbzoo.callbacks.log_values import Chart, Layout, log_histogram, log_image, log_layers, log_layout
from lbzoo.callbacks.optimizer_view import Layer, select, trained_layers, unwrap
from lbzoo.callbacks.trainer_view import TrainerView, at_least_one, coming_step, is_logged, loss_scale
from lbzoo.optim.layer_stats import LayerStats
from lbzoo.registry import register_callback

if TYPE_CHECKING:
    from numpy.typing import NDArray

_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
# Which quantiles of which quantity go to summary/.
_SUMMARIES = {
    "trust_ratio": ("min", "p10", "p50", "p90", "max"),
    "trust_ratio_grad": ("p10", "p50", "p90"),
    "update_ratio": ("p10", "p50", "p90"),
}


@register_callback("trust_ratio")
class TrustRatio(Callback):
    """Trust ratio, update/weight ratio and gradient norm of every layer, with quantiles, histogram and heatmap.

    Args:
        every: optimizer steps between logged ones.
        layers: globs of layer names (parameter names without the task's ``model.``).
        values: globs of the quantities to log for each layer, among those that the optimizer publishes.
        histogram: log the distribution of the trust ratios over the layers (TensorBoard).
        heatmap: log the image layers x time (TensorBoard), anew whenever it has grown by half.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        layers: tuple[str, ...] = ("*",),
        values: tuple[str, ...] = ("trust_ratio*", "update_ratio", "grad_norm"),
        histogram: bool = True,
        heatmap: bool = True,
    ) -> None:
        self.every, self.layers, self.values = at_least_one(every), tuple(layers), tuple(values)
        self.histogram, self.heatmap = histogram, heatmap
        self._restored: dict[str, Any] | None = None
        self._begin([])

    def _begin(self, layers: list[Layer]) -> None:
        self._chosen = layers
        self._watched: dict[Optimizer, StatsSource] = {}  # those whose coming step is logged
        self._history = History([layer.name for layer in layers])
        self._laid_out = False

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        """Chooses the layers: a glob that matches none fails before a step is made."""
        layers = trained_layers([unwrap(optimizer) for optimizer in trainer.optimizers], pl_module)
        chosen = select([layer.name for layer in layers], self.layers, what="layer")
        self._begin([layers[index] for index in chosen])
        if self._restored is not None:
            self._history.load_state(self._restored)
            self._restored = None

    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["history"]

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer) -> None:
        bare = unwrap(optimizer)
        if is_logged(coming_step(trainer), self.every) and bare not in self._watched:
            self._watched[bare] = stats_source(bare, self._chosen)
            self._watched[bare].before_step(loss_scale(trainer, bare))

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watched:
            # On every rank: under sharding the norms are sums over the ranks.
            stats = join([source.after_step() for source in self._watched.values()])
            self._watched.clear()
            if trainer.is_global_zero and stats.names:
                self._log(trainer, stats)

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self.heatmap and self._history.has_undrawn():
            self._log_heatmap(trainer)

    def _log(self, trainer: TrainerView, stats: LayerStats) -> None:
        step = trainer.global_step
        quantities = list(stats.values)
        shown = [quantities[index] for index in select(quantities, self.values, what="quantity of the optimizer")]
        table = torch.stack([stats.values[name].detach() for name in quantities]).cpu().double()  # the one host copy
        by_name = dict(zip(quantities, table, strict=True))
        summaries = {tag: value for name in by_name for tag, value in _quantiles(name, by_name[name].numpy()).items()}
        log_layers(trainer, {name: (stats.names, by_name[name]) for name in shown}, step, scalars=summaries)
        if not self._laid_out:
            log_layout(trainer, _layout(stats.names, shown))
            self._laid_out = True
        if "trust_ratio" in by_name:
            trust_ratios = by_name["trust_ratio"].numpy()
            if self.histogram:
                log_histogram(trainer, "hist/trust_ratio", _log10(trust_ratios), step)
            if self.heatmap:
                self._history.add(step, dict(zip(stats.names, trust_ratios.tolist(), strict=True)))
                if self._history.has_grown():
                    self._log_heatmap(trainer)

    def _log_heatmap(self, trainer: TrainerView) -> None:
        log_image(trainer, "heatmap/trust_ratio", draw(self._history), trainer.global_step)


def _quantiles(quantity: str, values: NDArray[np.float64]) -> dict[str, float]:
    shares = {name: _QUANTILES[name] for name in _SUMMARIES.get(quantity, ())}
    numbers = np.quantile(values, list(shares.values())) if shares else np.empty(0)
    return {f"summary/{quantity}_{name}": float(number) for name, number in zip(shares, numbers, strict=True)}


def _log10(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the positive values; a layer that stood still has none."""
    return np.log10(values[values > 0])


def _layout(names: Sequence[str], quantities: Sequence[str]) -> Layout:
    """Charts for the custom-scalar page: the quantiles together, and all layers of one part of the network together."""
    parts = _parts(names)
    band = ("p50", "p10", "p90")
    layout: dict[str, dict[str, Chart]] = {
        "over the layers": {
            "trust ratio: median, 10th to 90th percentile": ("Margin", [f"summary/trust_ratio_{q}" for q in band]),
            "trust ratio: minimum to maximum": ("Multiline", ["^summary/trust_ratio_(min|p10|p50|p90|max)$"]),
            "update / weight: median, 10th to 90th percentile": ("Margin", [f"summary/update_ratio_{q}" for q in band]),
        },
    }
    for quantity in quantities:
        layout[f"{quantity} of each layer"] = {
            part: ("Multiline", [f"^{quantity}/{re.escape(part)}(\\.|$)"]) for part in parts
        }
    return layout


def _parts(names: Sequence[str], most: int = 16) -> list[str]:
    """The network's parts, in its order: the modules of the deepest level that has at most ``most``."""
    paths = [name.split(".")[:-1] or [name] for name in names]
    parts: list[str] = []
    for depth in range(1, max(map(len, paths)) + 1):
        deeper = list(dict.fromkeys(".".join(path[:depth]) for path in paths))
        if parts and len(deeper) > most:
            break
        parts = deeper
    return parts
