"""NovoGrad: momentum on gradients that are normalised by a second moment kept per layer.

Ginsburg et al., "Training Deep Networks with Stochastic Gradient Normalized by Layerwise Adaptive Second Moments"
(arXiv 1905.11286), algorithm 1. For a parameter tensor x with gradient g::

    v = |g|^2 at the first step, then b2 v + (1 - b2) |g|^2          one number a tensor
    m = b1 m + g / (sqrt(v) + eps) + weight_decay x
    x = x - lr m

The first step is that of the first gradient that is not zero. ``betas[1] = 0`` is layer-wise normalised gradient
descent. The paper uses b2 = 0.98 on ImageNet and 0.25 elsewhere. Its variants: ``amsgrad`` (the largest v so far),
``ema`` (the new term of m times 1 - b1, except at the first step), ``decoupled`` (``weight_decay x`` in the update of x
instead of m).

Its equations 5 and 6 have eps under the root (``eps_in_root``); algorithm 1, followed here, has it outside.
"""

from __future__ import annotations

import math
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
from lbzoo.optim.state import new_average, new_layer_scalar


def novograd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema: bool = False,
    decoupled: bool = False,
    eps_in_root: bool = False,
    report: bool = False,
) -> Rule:
    """The rule on lists of tensors, in place; see ``rules`` for its form.

    ``exp_avg_sqs``: 0-dim, as are their maxima so far (None without AMSGrad).
    """
    (grad_norms,) = yield sweep(None, [grads], norms_of=[0])
    first, v = _second_moments(exp_avg_sqs, grad_norms.square(), betas[1])
    if max_exp_avg_sqs is not None:
        v = torch.maximum(_stacked(max_exp_avg_sqs, v), v)
        torch._foreach_copy_(list(max_exp_avg_sqs), list(v.unbind()))
    denominators = (v + eps).sqrt() if eps_in_root else v.sqrt() + eps
    ones = torch.ones_like(v)
    grad_scales = torch.where(denominators == 0, ones, 1 / denominators)  # 0: no gradient so far, and no eps

    # m = b1 m + weight (grad_scale g + weight_decay x)
    weights = torch.where(first, ones, 1 - betas[0]) if ema else ones
    decays = weights * (0.0 if decoupled else weight_decay)
    before = [param.clone() for param in params] if report and decoupled else []
    if decoupled:
        torch._foreach_mul_(list(params), 1 - lr * weight_decay)
    columns = [params, grads, exp_avgs, as_column(weights * grad_scales, params), as_column(decays, params)]
    momentum_step(*columns, lr=lr, momentum=betas[0])
    if not report:
        return {}
    (direction_norms,) = yield sweep(None, [exp_avgs], norms_of=[0])
    step_norms = (yield from norms_of_change(before, params)) if decoupled else lr * direction_norms
    return {"direction_norm": direction_norms, "step_norm": step_norms, "grad_scale": grad_scales}


def novograd_by_tensor(
    state: Mapping[str, Tensor],
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema: bool,
    decoupled: bool,
    eps_in_root: bool,
) -> None:
    """The rule for one tensor on a CPU (see ``by_tensor``)."""
    square, old = norm(grad) ** 2, state["exp_avg_sq"].item()
    v = square if old == 0 else betas[1] * old + (1 - betas[1]) * square
    state["exp_avg_sq"].fill_(v)
    if "max_exp_avg_sq" in state:
        v = max(v, state["max_exp_avg_sq"].item())
        state["max_exp_avg_sq"].fill_(v)
    denominator = math.sqrt(v + eps) if eps_in_root else math.sqrt(v) + eps
    weight = 1 - betas[0] if ema and old != 0 else 1.0
    decay = weight * weight_decay
    if decoupled:
        param.mul_(1 - lr * weight_decay)
        decay = 0.0
    grad_scale = 1.0 if denominator == 0 else 1 / denominator
    fused_momentum_step(param, grad, exp_avg, weight * grad_scale, decay, lr=lr, momentum=betas[0])


def _second_moments(exp_avg_sqs: Sequence[Tensor], squares: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """(which tensors had no gradient so far, the second moments after this one), [tensors] each; updates the state."""
    old = _stacked(exp_avg_sqs, squares)
    first = old == 0
    new = torch.where(first, squares, beta2 * old + (1 - beta2) * squares)
    torch._foreach_copy_(list(exp_avg_sqs), list(new.unbind()))
    return first, new


def _stacked(scalars: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(scalars)).to(like.dtype)


@register_optimizer(
    "novograd",
    paper="arXiv 1905.11286",
    equation="algorithm 1",
    state_per_param=1,
    layerwise=True,
)
class NovoGrad(LayerwiseOptimizer):
    """NovoGrad: momentum on gradients normalised by a second moment per layer; half of Adam's memory.

    ``lr`` lies between those of SGD and Adam. ``amsgrad``, ``ema``, ``decoupled``, ``eps_in_root``: variants, see the
    module. Raises UsageError for values out of range.
    """

    averages: ClassVar = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.95, 0.25),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        ema: bool = False,
        decoupled: bool = False,
        eps_in_root: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "ema": ema,
            "decoupled": decoupled,
            "eps_in_root": eps_in_root,
        }
        super().__init__(params, defaults)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {"exp_avg": new_average(param), "exp_avg_sq": new_layer_scalar(param)}
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = new_layer_scalar(param)
        return state

    def works_at_once(self, group: Mapping[str, Any], device: torch.device) -> bool:
        return True  # no temporaries, and little to gain from finding a gradient in the cache

    def tensor_step(self, group: Mapping[str, Any]) -> TensorStep | None:
        lr = learning_rate(group)
        if group["betas"][0] == 0 or isinstance(lr, Tensor):
            return None
        options = ("betas", "eps", "weight_decay", "ema", "decoupled", "eps_in_root")
        return partial(novograd_by_tensor, lr=lr, **{key: group[key] for key in options})

    def rule(self, batch: Batch) -> Rule:
        group = batch.group
        return novograd(
            batch.params,
            batch.grads,
            batch.state("exp_avg"),
            batch.state("exp_avg_sq"),
            batch.state("max_exp_avg_sq") if group["amsgrad"] else None,
            lr=batch.lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema=group["ema"],
            decoupled=group["decoupled"],
            eps_in_root=group["eps_in_root"],
            report=self.track_layer_stats,
        )
