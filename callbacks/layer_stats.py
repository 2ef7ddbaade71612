"""Statistics of one optimizer step for every layer: asked of the optimizer, or measured around its step.

An optimizer with ``layer_stats()`` fills it in a step made while its attribute ``track_layer_stats`` is true. For any
other the weights are copied before a logged step and compared after it, which costs that copy in memory until then.

What is measured: with x the weights before the step and s the step (x minus the weights after), ``update_ratio`` is
|s| / |x|, and ``trust_ratio`` is |x| / |u| with u = s / lr, the direction that the optimizer went in. For AdamW or
momentum this is the factor that LAMB or LARS would multiply that direction by; for a foreign layer-wise optimizer,
whose s holds its factor already, it is 1 wherever the factor is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lbzoo.callbacks.optimizer_view import Layer
from lbzoo.optim.layer_stats import LayerStats
from lbzoo.precision import at_least_float32
from lbzoo.sharding import ShardGroups, local, local_gradient, reduce_over_shards, shard_groups


class StatsSource(Protocol):
    """Of one optimizer step."""

    def before_step(self, loss_scale: float) -> None:
        """When the gradients are complete, ``loss_scale`` times too large."""

    def after_step(self) -> LayerStats:
        """Names as they are logged. On every rank: a collective where parameters are sharded."""


def stats_source(optimizer: Optimizer, layers: Sequence[Layer]) -> StatsSource:
    """For those of ``layers`` that ``optimizer`` trains."""
    own = [layer for layer in layers if layer.optimizer is optimizer]
    return Reported(optimizer, own) if hasattr(optimizer, "layer_stats") else Measured(own)


def join(stats: Sequence[LayerStats]) -> LayerStats:
    """The layers of several optimizers, with the quantities that all of them have."""
    stats = [each for each in stats if each.names] or stats[:1]
    if len(stats) == 1:
        return stats[0]
    common = [name for name in stats[0].values if all(name in each.values for each in stats)]
    names = [name for each in stats for name in each.names]
    return LayerStats(names, {name: torch.cat([each.values[name] for each in stats]) for name in common})


class Reported:
    """What an optimizer says of its step."""

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        self._optimizer, self._layers = optimizer, layers

    def before_step(self, loss_scale: float) -> None:
        self._earlier: LayerStats = self._optimizer.layer_stats()  # type: ignore[attr-defined]  # of lbzoo's optimizers
        self._optimizer.track_layer_stats = True  # type: ignore[attr-defined]

    def after_step(self) -> LayerStats:
        self._optimizer.track_layer_stats = False  # type: ignore[attr-defined]
        stats: LayerStats = self._optimizer.layer_stats()  # type: ignore[attr-defined]
        if stats is self._earlier:  # a GradScaler has skipped the step: these are of another one
            return LayerStats()
        row_of = {name: row for row, name in enumerate(stats.names)}
        layers = [layer for layer in self._layers if layer.reported_as in row_of]
        rows = [row_of[layer.reported_as] for layer in layers]
        return LayerStats([layer.name for layer in layers], {q: values[rows] for q, values in stats.values.items()})


class Measured:
    """What a step did to the weights. Only layers that have a gradient."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = [layer for layer in layers if layer.parameter.grad is not None]
        self._parameters = [layer.parameter for layer in self._layers]

    @torch.no_grad()
    def before_step(self, loss_scale: float) -> None:
        self._grad_norm = _norms(self._parameters, [[local_gradient(x) for x in self._parameters]])[0] / loss_scale
        lr_of_group = {id(layer.group): float(layer.group["lr"]) for layer in self._layers}
        self._lr = [lr_of_group[id(layer.group)] for layer in self._layers]  # the scheduler's, before it goes on
        self._before = [local(x).clone() for x in self._parameters]

    @torch.no_grad()
    def after_step(self) -> LayerStats:
        before, self._before = self._before, []
        steps = [at_least_float32(old) - local(new) for old, new in zip(before, self._parameters, strict=True)]
        norm, step = _norms(self._parameters, [before, steps])
        lr = torch.tensor(self._lr, dtype=step.dtype, device=step.device)
        values = {
            # 1, as the rules have it, where a norm is 0
            "trust_ratio": torch.where((norm > 0) & (step > 0), lr * norm / step, 1.0),
            "param_norm": norm,
            "grad_norm": self._grad_norm,
            "update_ratio": torch.where(norm > 0, step / norm, 0.0),
        }
        return LayerStats([layer.name for layer in self._layers], values)


def _norms(parameters: Sequence[Tensor], parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """2-norms [R, L] of R quantities that are laid out as L parameters are; ``parts`` are what this rank holds of them.

    One all_reduce for each set of shard groups, none where nothing is sharded.
    """
    if not parameters:
        return torch.zeros(len(parts), 0)
    device = local(parameters[0]).device
    norms = [torch._foreach_norm(list(row), 2.0, dtype=torch.float64) for row in parts]
    squares_RL = torch.stack([torch.stack([norm.to(device) for norm in row]) for row in norms]).square()
    return over_shards(parameters, squares_RL).sqrt()


def over_shards(parameters: Sequence[Tensor], sums_RL: Tensor) -> Tensor:
    """Add up R sums over what each rank holds of L parameters, in place, over the ranks that hold the rest."""
    columns: dict[ShardGroups, list[int]] = {}
    for column, parameter in enumerate(parameters):
        columns.setdefault(shard_groups(parameter), []).append(column)
    for groups, own in columns.items():
        sums_RL[:, own] = reduce_over_shards(sums_RL[:, own], groups)
    return sums_RL
