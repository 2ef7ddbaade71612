"""LARS as the LAMB paper states it: the averaged gradient with decay, scaled by layer to the norm of the weights.

You et al., arXiv 1904.00962, algorithm 1. For a parameter tensor x with gradient g::

    m = b1 m + (1 - b1) (g + weight_decay x)
    x = x - lr * phi(|x|) / |m| * m          the ratio is 1 where phi(|x|) or |m| is 0

Unlike LARS of 2017 (:mod:`lbzoo.optim.lars`) it has no trust coefficient, and the norm is that of the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lbzoo.optim.batch import Batch
from lbzoo.optim.elementwise import add_scaled_, sweep
from lbzoo.optim.info import register_optimizer
from lbzoo.optim.layerwise import LayerwiseOptimizer, trust_ratio
from lbzoo.optim.rules import Rule
from lbzoo.optim.state import new_average


def lars2020(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    adapt: bool = True,
    weight_norm_range: tuple[float, float] | None = None,
    report: bool = False,
) -> Rule:
    """The rule on lists of tensors, in place; see ``rules`` for its form."""
    average = partial(_average, momentum=momentum, weight_decay=weight_decay)
    param_norms, update_norms = yield sweep(average, [params, grads, exp_avgs], norms_of=[0, 2])
    ratios = trust_ratio(param_norms, update_norms, weight_norm_range) if adapt else torch.ones_like(update_norms)
    add_scaled_(params, (exp_avgs, -lr * ratios))
    return {"trust_ratio": ratios, "step_norm": lr * ratios * update_norms} if report else {}


def _average(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    momentum: float,
    weight_decay: float,
) -> None:
    torch._foreach_lerp_(list(exp_avgs), list(grads), 1 - momentum)
    torch._foreach_add_(list(exp_avgs), list(params), alpha=(1 - momentum) * weight_decay)


@register_optimizer(
    "lars2020",
    paper="arXiv 1904.00962",
    equation="algorithm 1",
    lr_scaling="sqrt",
    state_per_param=1,
    layerwise=True,
)
class Lars2020(LayerwiseOptimizer):
    """LARS of the LAMB paper: averaged gradients, each tensor's step scaled to the norm of its weights.

    ``lr``: the step of a tensor as a fraction of its norm. ``adapt``: scale the step by the trust ratio.
    ``weight_norm_range``: phi clamps |x| to it. Raises UsageError for values out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        adapt: bool = True,
        weight_norm_range: tuple[float, float] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adapt": adapt,
            "weight_norm_range": weight_norm_range,
        }
        super().__init__(params, defaults)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": new_average(param)}

    def rule(self, batch: Batch) -> Rule:
        group = batch.group
        return lars2020(
            batch.params,
            batch.grads,
            batch.state("exp_avg"),
            lr=batch.lr,
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            adapt=group["adapt"],
            weight_norm_range=group["weight_norm_range"],
            report=self.track_layer_stats,
        )
