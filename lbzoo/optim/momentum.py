"""Momentum on gradients that are scaled by a number a tensor, for the rules whose adaptation is that number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lbzoo.optim import fused_kernels
from lbzoo.optim.elementwise import on_eager_cpu, run


def momentum_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Sequence[Any],
    decays: Sequence[Any],
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool = False,
) -> None:
    """buffer = momentum * buffer + update with update = scale * grad + decay * param; then param -= lr * buffer.

    ``scales``, ``decays``: a number, or a 0-dim tensor, for each. ``nesterov``: param -= lr * (update + momentum *
    buffer).
    """
    columns = [params, grads, buffers, scales, decays]
    # The fused kernel takes its scale from the host; its Nesterov step leaves the scale out, and without momentum it
    # keeps no buffer.
    fusable = on_eager_cpu(params) and fused_kernels.are_for(params) and momentum > 0 and not nesterov
    if fusable and not isinstance(lr, Tensor):
        run(partial(_fused_step, lr=lr, momentum=momentum), columns, whole=True)
    else:
        run(partial(_plain_step, lr=lr, momentum=momentum, nesterov=nesterov), columns)


def _fused_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Sequence[float],
    decays: Sequence[float],
    *,
    lr: float,
    momentum: float,
) -> None:
    if not fused_kernels.can_fuse(params, grads, buffers):
        _plain_step(params, grads, buffers, scales, decays, lr=lr, momentum=momentum)
        return
    for param, grad, buffer, scale, decay in zip(params, grads, buffers, scales, decays, strict=True):
        fused_momentum_step(param, grad, buffer, scale, decay, lr=lr, momentum=momentum)


def fused_momentum_step(
    param: Tensor, grad: Tensor, buffer: Tensor, scale: float, decay: float, *, lr: float, momentum: float
) -> None:
    """:func:`momentum_step` for one tensor by the fused kernel, for a ``momentum`` that is not 0."""
    if scale > fused_kernels.SMALLEST_SCALE:
        fused_kernels.momentum_(param, grad, buffer, lr=lr, momentum=momentum, scale=scale, weight_decay=decay / scale)
    else:
        _plain_step([param], [grad], [buffer], [scale], [decay], lr=lr, momentum=momentum)


def _plain_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Sequence[Any],
    decays: Sequence[Any],
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool = False,
) -> None:
    x, buffer = list(params), list(buffers)
    updates = torch._foreach_mul(list(grads), list(scales))
    torch._foreach_add_(updates, torch._foreach_mul(x, list(decays)))
    torch._foreach_mul_(buffer, momentum)
    torch._foreach_add_(buffer, updates)
    if nesterov:
        torch._foreach_add_(updates, torch._foreach_mul(buffer, momentum))
    torch._foreach_sub_(x, torch._foreach_mul(updates if nesterov else buffer, lr))
