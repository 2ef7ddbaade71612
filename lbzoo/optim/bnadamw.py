"""AdamW with block-normalised gradients: every tensor's gradient is divided by its norm before the moments.

Zheng et al., arXiv 2006.13484, section 3.1: LANS without its layer-wise learning rates, used there to fine-tune on
SQuAD. For a parameter tensor x with gradient g, AdamW on gn = g / |g| (0 where |g| is 0)::

    x = x - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay x)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lbzoo.optim.adam_moments import adam_direction, adam_step
from lbzoo.optim.batch import Batch
from lbzoo.optim.elementwise import Kernel, add_scaled_, as_column, run, sweep
from lbzoo.optim.info import register_optimizer
from lbzoo.optim.layerwise import LayerwiseOptimizer, inverse_norms
from lbzoo.optim.rules import Rule
from lbzoo.optim.state import new_average, new_step_count


def bnadamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    *,
    lr: float | Tensor,
    norm_eps: float = 0.0,
    report: bool = False,
    **adam: Any,
) -> Rule:
    """The rule on lists of tensors, in place; see ``rules`` for its form. ``adam``: adam_direction's options."""
    (grad_norms,) = yield sweep(None, [grads], norms_of=[0])
    columns = [params, grads, as_column(inverse_norms(grad_norms, norm_eps), params), exp_avgs, exp_avg_sqs, steps]
    if not report:
        run(partial(_on_scaled_grads, partial(adam_step, lr=lr, **adam)), columns)
        return {}
    updates = [torch.empty_like(param) for param in params]
    kernel = partial(_on_scaled_grads, partial(adam_direction, **adam))
    (update_norms,) = yield sweep(kernel, [*columns, updates], norms_of=[6])
    add_scaled_(params, (updates, torch.ones_like(update_norms) * -lr))
    return {"direction_norm": update_norms, "step_norm": lr * update_norms}


def _on_scaled_grads(
    kernel: Kernel, params: Sequence[Tensor], grads: Sequence[Tensor], scales: Sequence[Any], *columns: Sequence[Any]
) -> None:
    kernel(params, torch._foreach_mul(list(grads), list(scales)), *columns)


@register_optimizer(
    "bnadamw",
    paper="arXiv 2006.13484",
    equation="section 3.1",
    lr_scaling="sqrt",
    state_per_param=2,
    layerwise=True,
)
class BnAdamW(LayerwiseOptimizer):
    """AdamW on gradients divided by their layer's norm.

    ``norm_eps`` is added to that norm. Raises UsageError for values out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        norm_eps: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "norm_eps": norm_eps}
        )

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"step": new_step_count(), "exp_avg": new_average(param), "exp_avg_sq": new_average(param)}

    def rule(self, batch: Batch) -> Rule:
        group = batch.group
        return bnadamw(
            batch.params,
            batch.grads,
            batch.state("exp_avg"),
            batch.state("exp_avg_sq"),
            batch.next_steps(),
            lr=batch.lr,
            norm_eps=group["norm_eps"],
            report=self.track_layer_stats,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
