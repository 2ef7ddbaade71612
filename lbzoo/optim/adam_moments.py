"""Adam's moments and the direction they give, for the rules that scale or combine it by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lbzoo.optim import fused_kernels

Nesterov = Literal["first", "both"] | None


def adam_direction(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    directions: Sequence[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    nesterov: Nesterov = None,
) -> None:
    """Update the moments m, v in place and set ``directions`` to m_hat / (sqrt(v_hat) + eps) + weight_decay * params.

    ``steps``: the number of this step for each tensor, from 1. ``nesterov``: Nadam's look-ahead in the "first" moment
    (Dozat 2016; LAMB paper, algorithm 3) or in "both" (algorithm 4). An elementwise kernel.
    """
    if nesterov is None and fused_kernels.can_fuse(params, grads, exp_avgs, exp_avg_sqs, directions):
        for param, direction in zip(params, directions, strict=True):
            torch.mul(param, weight_decay, out=direction)
        times = steps if bias_correction else [float("inf")] * len(steps)
        # A learning rate of -1 adds m_hat / (sqrt(v_hat) + eps) to what is there.
        fused_kernels.adam_(directions, grads, exp_avgs, exp_avg_sqs, times, lr=-1.0, betas=betas, eps=eps)
        return
    (beta1, beta2), g, m, v = betas, list(grads), list(exp_avgs), list(exp_avg_sqs)
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)

    m_hat = _corrected(m, g, beta1, steps, bias_correction, look_ahead=nesterov is not None)
    squares = torch._foreach_mul(g, g) if nesterov == "both" else g
    v_hat = _corrected(v, squares, beta2, steps, bias_correction, look_ahead=nesterov == "both")
    if nesterov == "first":
        torch._foreach_mul_(v_hat, beta2)  # as Nadam and algorithm 3 have it

    torch._foreach_sqrt_(v_hat)
    torch._foreach_add_(v_hat, eps)
    torch._foreach_div_(m_hat, v_hat)
    torch._foreach_copy_(list(directions), list(params))
    torch._foreach_mul_(list(directions), weight_decay)
    torch._foreach_add_(list(directions), m_hat)


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    *,
    lr: float | Tensor,
    **options: Any,
) -> None:
    """params -= lr * direction, moments updated in place (``options``: adam_direction's). An elementwise kernel."""
    plain = options.get("nesterov") is None and options.get("bias_correction", True) and not isinstance(lr, Tensor)
    if plain and fused_kernels.can_fuse(params, grads, exp_avgs, exp_avg_sqs):
        betas, eps, weight_decay = options["betas"], options["eps"], options["weight_decay"]
        fused_kernels.adam_(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        return
    directions = [torch.empty_like(param) for param in params]
    adam_direction(params, grads, exp_avgs, exp_avg_sqs, steps, directions, **options)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(list(params), directions)


def _corrected(
    average: list[Tensor], newest: list[Tensor], beta: float, steps: Sequence[Any], correct: bool, *, look_ahead: bool
) -> list[Tensor]:
    """New tensors: average / (1 - beta^t), or the look-ahead
    beta * average / (1 - beta^(t+1)) + (1 - beta) * newest / (1 - beta^t); without bias correction both divisors are 1.
    """

    def mass(step: Any) -> Any:
        return 1 - beta**step if correct else 1.0

    if not look_ahead:
        return list(torch._foreach_div(average, [mass(step) for step in steps]))
    hat = list(torch._foreach_mul(average, [beta / mass(step + 1) for step in steps]))
    torch._foreach_add_(hat, torch._foreach_mul(newest, [(1 - beta) / mass(step) for step in steps]))
    return hat
