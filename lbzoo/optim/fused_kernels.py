"""torch's fused Adam and SGD kernels as primitives: one pass over memory where ordinary operations need several.

They are private to torch, so :func:`fused_kernels_work` compares them with plain formulas before their first use on a
kind of device, and every caller has the plain formula to fall back to. They are silently wrong on tensors whose
strides differ, hence :func:`can_fuse`. Their ``grad_scale`` argument, which overwrites the gradients, is never used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]

SMALLEST_SCALE = 1e-10

_TYPES = (torch.float32, torch.float64)


def are_for(tensors: Tensors) -> bool:
    """Whether there are kernels for such tensors: float32 or float64, on a CPU or CUDA, outside torch.compile."""
    if torch.compiler.is_compiling() or not tensors:
        return False
    device = tensors[0].device.type
    return device in ("cpu", "cuda") and tensors[0].dtype in _TYPES and fused_kernels_work(device)


def can_fuse(*columns: Tensors) -> bool:
    """Whether lists of tensors may go to a kernel together: there is one, and all are contiguous and of one type."""
    return (
        are_for(columns[0])
        and len({tensor.dtype for column in columns for tensor in column}) == 1
        and all(all(map(Tensor.is_contiguous, column)) for column in columns)
    )


def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Sequence[float],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """params -= lr * (weight_decay * params + m_hat / (sqrt(v_hat) + eps)); the moments m, v are updated in place.

    ``steps``: the number of this step for each tensor, from 1; infinity leaves out the bias correction.
    """
    device = params[0].device
    times = {step: torch.full((), step, dtype=torch.float32, device=device) for step in set(steps)}
    adam_at_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [times[step] for step in steps],
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )


def adam_at_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """:func:`adam_` with the numbers of the steps in 0-dim float32 tensors."""
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def add_quotient_(params: Tensors, numerators: Tensors, exp_avg_sqs: Tensors, *, lr: float, eps: float) -> None:
    """params -= lr * numerators / (sqrt(exp_avg_sqs) + eps), in float32; the other two stay as they are.

    It is Adam's step with averages that are too slow to move by a float32.
    """
    beta = 1 - 2.0**-53
    adam_(params, numerators, numerators, exp_avg_sqs, [math.inf] * len(params), lr=lr, betas=(beta, beta), eps=eps)


def momentum_(
    param: Tensor, grad: Tensor, buffer: Tensor, *, lr: float, momentum: float, scale: float, weight_decay: float
) -> None:
    """buffer = momentum * buffer + scale * (grad + weight_decay * param); param -= lr * buffer.

    The scale must be above SMALLEST_SCALE: the kernel is given 1 - scale, which cancels.
    """
    torch._fused_sgd_(
        [param],
        [grad],
        [buffer],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=1.0 - scale,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


@functools.cache
def fused_kernels_work(device_type: str) -> bool:
    """Whether this torch has the kernels and they compute what is expected of them (a check of about a millisecond)."""
    try:
        return _adam_works(device_type) and _quotient_works(device_type) and _momentum_works(device_type)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return False


def _adam_works(device: str) -> bool:
    x, g, m, v = _lines(device, (-2, 2), (1, -3), (-0.1, 0.2), (0.01, 0.5))
    m_new, v_new = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
    direction = m_new / (1 - 0.8**3) / ((v_new / (1 - 0.7**3)).sqrt() + 1e-3)
    expected = (x + 0.5 * (direction + 0.1 * x), g.clone(), m_new, v_new)
    adam_([x], [g], [m], [v], [3.0], lr=-0.5, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.1)
    return _all_close((x, g, m, v), expected)


def _quotient_works(device: str) -> bool:
    x, g, v = _lines(device, (-2, 2), (1, -3), (0.01, 0.5))
    unchanged = (g.clone(), v.clone())
    expected = x - 0.5 * g / (v.sqrt() + 1e-3)
    add_quotient_([x], [g], [v], lr=0.5, eps=1e-3)
    return _all_close((x,), (expected,)) and torch.equal(g, unchanged[0]) and torch.equal(v, unchanged[1])


def _momentum_works(device: str) -> bool:
    x, g, m = _lines(device, (-2, 2), (1, -3), (-0.1, 0.2))
    m_new = 0.8 * m + 1e-5 * (g + 0.1 * x)
    expected = (x - 0.5 * m_new, g.clone(), m_new)
    momentum_(x, g, m, lr=0.5, momentum=0.8, scale=1e-5, weight_decay=0.1)
    return _all_close((x, g, m), expected)


def _lines(device: str, *ends: tuple[float, float]) -> list[Tensor]:
    return [torch.linspace(*pair, 37, device=device) for pair in ends]


def _all_close(got: Tensors, expected: Tensors) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, expected, strict=True))
