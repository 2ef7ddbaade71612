"""LAMB: Adam's direction with decoupled decay, scaled by layer to the norm of the weights.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes" (arXiv 1904.00962), algorithm 2,
and its Nesterov forms N-LAMB and NN-LAMB (algorithms 3 and 4). For a parameter tensor x with gradient g at step t::

    m = b1 m + (1 - b1) g                    m_hat = m / (1 - b1^t)
    v = b2 v + (1 - b2) g^2                  v_hat = v / (1 - b2^t)
    u = m_hat / (sqrt(v_hat) + eps) + weight_decay x
    x = x - lr * phi(|x|) / |u| * u          the ratio is 1 where phi(|x|) or |u| is 0

``nesterov="first"``: m_hat = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t) and v_hat = b2 v / (1 - b2^t);
``nesterov="both"``: v_hat looks ahead as m_hat does. Without ``bias_correction`` (the paper's appendix E) all these
divisors are 1. The listing in the paper lost the square root of v; section 3.2 has it.

What is not in the paper: parameters with ``adapt=False`` take the plain step ``x - lr u``, and the state holds m and v
before correction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lbzoo.optim import fused_kernels
from lbzoo.optim.adam_moments import adam_direction, adam_step
from lbzoo.optim.batch import Batch, Scratch, learning_rate
from lbzoo.optim.by_tensor import TensorStep, pieces, square_sum
from lbzoo.optim.elementwise import add_scaled_, run, sweep
from lbzoo.optim.fused_kernels import adam_at_
from lbzoo.optim.info import register_optimizer
from lbzoo.optim.layerwise import LayerwiseOptimizer, trust_ratio, trust_ratio_of
from lbzoo.optim.rules import Rule
from lbzoo.optim.state import new_average, new_step_count


def lamb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    updates: Sequence[Tensor],
    *,
    lr: float | Tensor,
    adapt: bool = True,
    norm_order: float = 2.0,
    weight_norm_range: tuple[float, float] | None = None,
    report: bool = False,
    **adam: Any,
) -> Rule:
    """The rule on lists of tensors, in place; see ``rules`` for its form.

    ``updates``: temporaries like ``params``. ``adam``: the options of :func:`adam_direction`.
    """
    moments = [params, grads, exp_avgs, exp_avg_sqs, steps]
    if not adapt and not report:
        run(partial(adam_step, lr=lr, **adam), moments, whole=fused_kernels.are_for(params))
        return {}
    direction = partial(adam_direction, **adam)
    param_norms, update_norms = yield sweep(direction, [*moments, updates], norms_of=[0, 5], order=norm_order)
    ratios = trust_ratio(param_norms, update_norms, weight_norm_range) if adapt else torch.ones_like(update_norms)
    add_scaled_(params, (updates, -lr * ratios))
    if not report:
        return {}
    if norm_order != 2.0:
        (update_norms,) = yield sweep(None, [updates], norms_of=[0])
    return {"trust_ratio": ratios, "step_norm": lr * ratios * update_norms}


def lamb_by_tensor(
    state: Mapping[str, Tensor],
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    scratch: Scratch,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    adapt: bool,
    weight_norm_range: tuple[float, float] | None,
) -> None:
    """The rule for one tensor on a CPU (see ``by_tensor``)."""
    time = state["step"] if bias_correction else torch.tensor(math.inf)
    if not adapt:
        averages = ([exp_avg], [exp_avg_sq], [time])
        adam_at_([param], [grad], *averages, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        return
    param_square = update_square = 0.0
    parts = pieces(param, grad, exp_avg, exp_avg_sq, scratch.flat(param.numel(), param.dtype))
    for x, g, m, v, update in parts:
        param_square += square_sum(x)
        torch.mul(x, weight_decay, out=update)
        adam_at_([update], [g], [m], [v], [time], lr=-1.0, betas=betas, eps=eps)
        update_square += square_sum(update)
    factor = -lr * trust_ratio_of(math.sqrt(param_square), math.sqrt(update_square), weight_norm_range)
    for x, _, _, _, update in reversed(parts):  # from the end: there the cache is still warm
        x.add_(update, alpha=factor)


@register_optimizer(
    "lamb",
    paper="arXiv 1904.00962",
    equation="algorithm 2",
    lr_scaling="sqrt",
    state_per_param=2,
    layerwise=True,
)
class Lamb(LayerwiseOptimizer):
    """LAMB: Adam with decoupled weight decay, each tensor's step scaled to the norm of its weights.

    ``lr``: the step of a tensor as a fraction of its norm. ``adapt``: scale the step by the trust ratio.
    ``norm_order``: 1, 2 or inf (appendix F). ``weight_norm_range``: phi clamps |x| to it. ``bias_correction``,
    ``nesterov``: see the module. Raises UsageError for values out of range.
    """

    choices: ClassVar = {"nesterov": (None, "first", "both")}

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        nesterov: Literal["first", "both"] | None = None,
        adapt: bool = True,
        norm_order: float = 2.0,
        weight_norm_range: tuple[float, float] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "nesterov": nesterov,
            "adapt": adapt,
            "norm_order": norm_order,
            "weight_norm_range": weight_norm_range,
        }
        super().__init__(params, defaults)

    averages: ClassVar = ("exp_avg", "exp_avg_sq")

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"step": new_step_count(), "exp_avg": new_average(param), "exp_avg_sq": new_average(param)}

    def tensor_step(self, group: Mapping[str, Any]) -> TensorStep | None:
        lr = learning_rate(group)
        if group["nesterov"] is not None or group["norm_order"] != 2.0 or isinstance(lr, Tensor):
            return None
        options = ("betas", "eps", "weight_decay", "bias_correction", "adapt", "weight_norm_range")
        return partial(lamb_by_tensor, scratch=self._scratch, lr=lr, **{key: group[key] for key in options})

    def rule(self, batch: Batch) -> Rule:
        group = batch.group
        return lamb(
            batch.params,
            batch.grads,
            batch.state("exp_avg"),
            batch.state("exp_avg_sq"),
            batch.next_steps(),
            batch.temporaries(),
            lr=batch.lr,
            adapt=group["adapt"],
            norm_order=group["norm_order"],
            weight_norm_range=group["weight_norm_range"],
            report=self.track_layer_stats,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=group["bias_correction"],
            nesterov=group["nesterov"],
        )
