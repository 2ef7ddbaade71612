"""LARS: momentum with a learning rate of its own for every layer.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), algorithm 1. For a parameter
tensor x with gradient g::

    q = trust_coefficient |x| / (|g| + weight_decay |x|)          1 where |x| or |g| is 0
    buffer = momentum buffer + lr q (g + weight_decay x)
    x = x - buffer

Also: ``lr_in_momentum=False`` has the learning rate outside the buffer, ``x = x - lr buffer``, as torch's SGD does
(the two differ only while the learning rate changes); ``nesterov``; ``clip``, LARC's form of it, q = min(q / lr, 1), so
that no layer's rate is above ``lr``; and parameters with ``adapt=False`` have q = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lbzoo.optim.batch import Batch, learning_rate
from lbzoo.optim.by_tensor import TensorStep, norm
from lbzoo.optim.elementwise import as_column, sweep
from lbzoo.optim.info import register_optimizer
from lbzoo.optim.layerwise import LayerwiseOptimizer, norms_of_change
from lbzoo.optim.momentum import fused_momentum_step, momentum_step
from lbzoo.optim.rules import Rule
from lbzoo.optim.state import new_average


def lars(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    nesterov: bool = False,
    lr_in_momentum: bool = True,
    clip: bool = False,
    adapt: bool = True,
    report: bool = False,
) -> Rule:
    """The rule on lists of tensors, in place; see ``rules`` for its form."""
    ratios = torch.ones(len(params), dtype=params[0].dtype, device=params[0].device)
    if adapt:
        param_norms, grad_norms = yield sweep(None, [params, grads], norms_of=[0, 1])
        ratios = local_rates(param_norms, grad_norms, trust_coefficient, weight_decay)
        if clip:
            ratios = (ratios / lr).clamp(max=1.0)
    scales, outer_lr = (ratios * lr, 1.0) if lr_in_momentum else (ratios, lr)
    before = [param.clone() for param in params] if report and nesterov else []
    columns = [params, grads, buffers, as_column(scales, params), as_column(scales * weight_decay, params)]
    momentum_step(*columns, lr=outer_lr, momentum=momentum, nesterov=nesterov)
    if not report:
        return {}
    if nesterov:
        step_norms = yield from norms_of_change(before, params)
    else:
        (buffer_norms,) = yield sweep(None, [buffers], norms_of=[0])
        step_norms = outer_lr * buffer_norms
    return {"trust_ratio": ratios, "step_norm": step_norms}


def lars_by_tensor(
    state: Mapping[str, Tensor],
    param: Tensor,
    grad: Tensor,
    buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    lr_in_momentum: bool,
    clip: bool,
    adapt: bool,
) -> None:
    """The rule for one tensor on a CPU (see ``by_tensor``), without ``nesterov``."""
    ratio = 1.0
    if adapt:
        ratio = _local_rate(norm(param), norm(grad), trust_coefficient, weight_decay)
        if clip:
            ratio = min(ratio / lr, 1.0) if lr > 0 else 1.0
    scale, outer_lr = (ratio * lr, 1.0) if lr_in_momentum else (ratio, lr)
    fused_momentum_step(param, grad, buffer, scale, scale * weight_decay, lr=outer_lr, momentum=momentum)


def _local_rate(param_norm: float, grad_norm: float, trust_coefficient: float, weight_decay: float) -> float:
    """:func:`local_rates` for one tensor, with numbers."""
    if param_norm == 0 or grad_norm == 0:
        return 1.0
    return trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm)


def local_rates(
    param_norms: Tensor, grad_norms: Tensor, trust_coefficient: float, weight_decay: float | Tensor
) -> Tensor:
    """trust_coefficient |x| / (|g| + weight_decay |x|), and 1 where either norm is 0."""
    rates = trust_coefficient * param_norms / (grad_norms + weight_decay * param_norms)
    return torch.where((param_norms == 0) | (grad_norms == 0), 1.0, rates)


@register_optimizer(
    "lars",
    paper="arXiv 1708.03888",
    equation="algorithm 1",
    lr_scaling="linear",
    state_per_param=1,
    layerwise=True,
)
class Lars(LayerwiseOptimizer):
    """LARS of 2017: momentum, each tensor's learning rate scaled by |x| / |g| and a trust coefficient.

    ``adapt``, ``nesterov``, ``lr_in_momentum``, ``clip``: see the module. Raises UsageError for values out of range.
    """

    choices: ClassVar = {"nesterov": (False, True)}

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
            "lr_in_momentum": lr_in_momentum,
            "clip": clip,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    averages: ClassVar = ("momentum_buffer",)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": new_average(param)}

    def tensor_step(self, group: Mapping[str, Any]) -> TensorStep | None:
        lr = learning_rate(group)
        if group["nesterov"] or group["momentum"] == 0 or isinstance(lr, Tensor):
            return None
        options = ("momentum", "weight_decay", "trust_coefficient", "lr_in_momentum", "clip", "adapt")
        return partial(lars_by_tensor, lr=lr, **{key: group[key] for key in options})

    def rule(self, batch: Batch) -> Rule:
        group = batch.group
        return lars(
            batch.params,
            batch.grads,
            batch.state("momentum_buffer"),
            lr=batch.lr,
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coefficient"],
            nesterov=group["nesterov"],
            lr_in_momentum=group["lr_in_momentum"],
            clip=group["clip"],
            adapt=group["adapt"],
            report=self.track_layer_stats,
        )
