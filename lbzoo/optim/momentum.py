"""Momentum on gradients that are scaled by a number a tensor, for the rules whose adaptation is that number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lbzoo.optim import fused_kernels


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
    buffer). An elementwise kernel.
    """
    # The kernel's Nesterov step leaves out the scale, and without momentum it keeps no buffer.
    suited = not nesterov and momentum > 0
    if suited and not isinstance(lr, Tensor) and fused_kernels.can_fuse(params, grads, buffers):
        for param, grad, buffer, scale, decay in zip(params, grads, buffers, scales, decays, strict=True):
            if fused_kernels.scale_is_exact(scale):
                fused_kernels.momentum_(
                    [param], [grad], [buffer], lr=lr, momentum=momentum, scale=scale, weight_decay=decay / scale
                )
            else:
                _plain_step([param], [grad], [buffer], [scale], [decay], lr, momentum, nesterov)
        return
    _plain_step(list(params), list(grads), list(buffers), list(scales), list(decays), lr, momentum, nesterov)


def _plain_step(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    scales: list[Any],
    decays: list[Any],
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
) -> None:
    updates = torch._foreach_mul(grads, scales)
    torch._foreach_add_(updates, torch._foreach_mul(params, decays))
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, updates)
    if nesterov:
        torch._foreach_add_(updates, torch._foreach_mul(buffers, momentum))
    torch._foreach_sub_(params, torch._foreach_mul(updates if nesterov else buffers, lr))
