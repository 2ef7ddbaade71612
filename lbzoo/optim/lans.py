"""LANS: LAMB on gradients normalised by layer, its step a mixture of two, each scaled to the norm of the weights.

Zheng et al., "Accelerated Large Batch Optimization of BERT Pretraining in 54 Minutes" (arXiv 2006.13484), algorithm 2.
For a parameter tensor x with gradient g at step t::

    gn = g / |g|                              0 where |g| is 0
    m = b1 m + (1 - b1) gn                    m_hat = m / (1 - b1^t)
    v = b2 v + (1 - b2) gn^2                  v_hat = v / (1 - b2^t)
    r = m_hat / (sqrt(v_hat) + eps) + weight_decay x
    c = gn / (sqrt(v_hat) + eps) + weight_decay x
    x = x - lr * phi(|x|) * (b1 r / |r| + (1 - b1) c / |c|)

Each ratio phi(|x|)/|.| is 1 where either norm is 0. ``normalize_grad=False`` is the paper's equation 7, gn = g.
``norm_eps`` is added to |g|, as some implementations do. Parameters with ``adapt=False`` take both ratios as 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lbzoo.optim.adam_moments import adam_direction, gradient_direction
from lbzoo.optim.batch import Batch, learning_rate
from lbzoo.optim.by_tensor import TensorStep
from lbzoo.optim.elementwise import add_scaled_, as_column, sweep
from lbzoo.optim.info import register_optimizer
from lbzoo.optim.lans_by_tensor import EagerPasses, lans_by_tensor
from lbzoo.optim.lans_compiled import CompiledPasses
from lbzoo.optim.layerwise import LayerwiseOptimizer, inverse_norms, trust_ratio
from lbzoo.optim.rules import Rule
from lbzoo.optim.state import new_average, new_step_count


def lans(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    average_updates: Sequence[Tensor],
    grad_updates: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    normalize_grad: bool = True,
    norm_eps: float = 0.0,
    adapt: bool = True,
    weight_norm_range: tuple[float, float] | None = None,
    report: bool = False,
) -> Rule:
    """The rule on lists of tensors, in place; see ``rules`` for its form.

    ``average_updates`` (r) and ``grad_updates`` (c): temporaries like ``params``.
    """
    columns = [params, grads, exp_avgs, exp_avg_sqs, steps, average_updates, grad_updates]
    if normalize_grad:
        (grad_norms,) = yield sweep(None, [grads], norms_of=[0])
        columns.append(as_column(inverse_norms(grad_norms, norm_eps), params))
    directions = partial(_directions, betas=betas, eps=eps, weight_decay=weight_decay)
    param_norms, r_norms, c_norms = yield sweep(directions, columns, norms_of=[0, 5, 6])
    r_ratios, c_ratios = torch.ones_like(r_norms), torch.ones_like(c_norms)
    if adapt:
        r_ratios = trust_ratio(param_norms, r_norms, weight_norm_range)
        c_ratios = trust_ratio(param_norms, c_norms, weight_norm_range)
    r_factors, c_factors = -lr * betas[0] * r_ratios, -lr * (1 - betas[0]) * c_ratios
    if not report:
        add_scaled_(params, (average_updates, r_factors), (grad_updates, c_factors))
        return {}
    change = [torch.zeros_like(param) for param in params]
    add_scaled_(change, (average_updates, r_factors), (grad_updates, c_factors))
    torch._foreach_add_(list(params), change)
    (step_norms,) = yield sweep(None, [change], norms_of=[0])
    return {"trust_ratio": r_ratios, "trust_ratio_grad": c_ratios, "step_norm": step_norms}


def _directions(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    average_updates: Sequence[Tensor],
    grad_updates: Sequence[Tensor],
    grad_scales: Sequence[Any] | None = None,
    **options: Any,
) -> None:
    """Update the moments and set both updates: r from the average, c from the gradient. An elementwise kernel."""
    if grad_scales is not None:
        grads = torch._foreach_mul(list(grads), list(grad_scales))
    adam_direction(params, grads, exp_avgs, exp_avg_sqs, steps, average_updates, **options)
    gradient_direction(params, grads, exp_avg_sqs, steps, grad_updates, **options)


@register_optimizer(
    "lans",
    paper="arXiv 2006.13484",
    equation="algorithm 2",
    lr_scaling="sqrt",
    state_per_param=2,
    layerwise=True,
)
class Lans(LayerwiseOptimizer):
    """LANS: LAMB with gradients normalised by layer and a look-ahead scaled on its own.

    ``lr``: the step of a tensor as a fraction of its norm. ``normalize_grad``, ``norm_eps``, ``adapt``: see the module.
    ``weight_norm_range``: phi clamps |x| to it. ``compile``: on a CPU, in kernels that torch.compile makes (see
    ``lans_compiled``; some 15 s at the first step, needs a C++ compiler). Raises UsageError for values out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        normalize_grad: bool = True,
        norm_eps: float = 0.0,
        adapt: bool = True,
        weight_norm_range: tuple[float, float] | None = None,
        compile: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "normalize_grad": normalize_grad,
            "norm_eps": norm_eps,
            "adapt": adapt,
            "weight_norm_range": weight_norm_range,
            "compile": compile,
        }
        super().__init__(params, defaults)

    averages: ClassVar = ("exp_avg", "exp_avg_sq")

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"step": new_step_count(), "exp_avg": new_average(param), "exp_avg_sq": new_average(param)}

    def tensor_step(self, group: Mapping[str, Any]) -> TensorStep | None:
        lr = learning_rate(group)
        if isinstance(lr, Tensor):
            return None
        passes = CompiledPasses if group.get("compile", False) else partial(EagerPasses, scratch=self._scratch)
        options = ("betas", "eps", "weight_decay", "normalize_grad", "norm_eps", "adapt", "weight_norm_range")
        return partial(lans_by_tensor, make_passes=passes, lr=lr, **{key: group[key] for key in options})

    def rule(self, batch: Batch) -> Rule:
        group = batch.group
        return lans(
            batch.params,
            batch.grads,
            batch.state("exp_avg"),
            batch.state("exp_avg_sq"),
            batch.next_steps(),
            batch.temporaries(0),
            batch.temporaries(1),
            lr=batch.lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            normalize_grad=group["normalize_grad"],
            norm_eps=group["norm_eps"],
            adapt=group["adapt"],
            weight_norm_range=group["weight_norm_range"],
            report=self.track_layer_stats,
        )
