"""Adam's moments and the direction they give, for the rules that scale or combine it by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lbzoo.optim import fused_kernels
from lbzoo.optim.elementwise import on_eager_cpu

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
        _set_scaled(directions, params, weight_decay)
        times = _times(steps, bias_correction)
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
    _set_scaled(directions, params, weight_decay)
    torch._foreach_add_(list(directions), m_hat)


def gradient_direction(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    directions: Sequence[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Set ``directions`` to grads / (sqrt(v_hat) + eps) + weight_decay * params, v as it is. An elementwise kernel."""
    _set_scaled(directions, params, weight_decay)
    fusable = grads[0].dtype is torch.float32 and fused_kernels.can_fuse(params, grads, exp_avg_sqs, directions)
    if fusable and len(set(steps)) == 1:
        # v_hat = v / root^2, so that grad / (sqrt(v_hat) + eps) = root * grad / (sqrt(v) + root * eps)
        root = math.sqrt(1 - betas[1] ** steps[0])
        fused_kernels.add_quotient_(directions, grads, exp_avg_sqs, lr=-root, eps=root * eps)
        return
    denominators = _corrected(list(exp_avg_sqs), grads, betas[1], steps, True, look_ahead=False)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(list(directions), list(grads), denominators)


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    nesterov: Nesterov = None,
) -> None:
    """params -= lr * direction, with moments and direction as in :func:`adam_direction`. An elementwise kernel."""
    moments = (params, grads, exp_avgs, exp_avg_sqs)
    if nesterov is None and not isinstance(lr, Tensor) and fused_kernels.can_fuse(*moments):
        times = _times(steps, bias_correction)
        fused_kernels.adam_(*moments, times, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        return
    directions = [torch.empty_like(param) for param in params]
    adam_direction(
        *moments,
        steps,
        directions,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        nesterov=nesterov,
    )
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(list(params), directions)


def _set_scaled(targets: Sequence[Tensor], sources: Sequence[Tensor], factor: float) -> None:
    """targets = factor * sources."""
    if on_eager_cpu(targets) and len(targets) == 1:
        torch.mul(sources[0], factor, out=targets[0])  # one pass where the two below are two
    else:
        torch._foreach_zero_(list(targets))
        torch._foreach_add_(list(targets), list(sources), alpha=factor)  # on a CPU four times quicker than to multiply


def _times(steps: Sequence[float], bias_correction: bool) -> Sequence[float]:
    return steps if bias_correction else [float("inf")] * len(steps)


def _corrected(
    average: list[Tensor],
    newest: Sequence[Tensor],
    beta: float,
    steps: Sequence[Any],
    correct: bool,
    *,
    look_ahead: bool,
) -> list[Tensor]:
    """New tensors: average / (1 - beta^t), or the look-ahead
    beta * average / (1 - beta^(t+1)) + (1 - beta) * newest / (1 - beta^t); without bias correction both divisors are 1.
    """

    def mass(step: Any) -> Any:
        return 1 - beta**step if correct else 1.0

    if not look_ahead:
        return list(torch._foreach_div(average, [mass(step) for step in steps]))
    hat = list(torch._foreach_mul(average, [beta / mass(step + 1) for step in steps]))
    torch._foreach_add_(hat, torch._foreach_mul(list(newest), [(1 - beta) / mass(step) for step in steps]))
    return hat
