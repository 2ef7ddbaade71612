"""arXiv 1905.11286, algorithm 1 and the variants after it."""

from __future__ import annotations

import numpy as np


def novograd(
    x, g, state, *, lr, betas, eps, weight_decay, amsgrad=False, ema=False, decoupled=False, eps_in_root=False
):
    b1, b2 = betas
    size = np.sum(g**2)
    started = state.get("v", 0.0) > 0
    v = state["v"] = b2 * state["v"] + (1 - b2) * size if started else size
    if amsgrad:
        v = state["v_max"] = max(state.get("v_max", 0.0), v)
    below = np.sqrt(v + eps) if eps_in_root else np.sqrt(v) + eps
    new = g / below if below > 0 else np.zeros_like(g)
    if not decoupled:
        new = new + weight_decay * x
    if ema and started:
        new = (1 - b1) * new
    m = state["m"] = b1 * state.get("m", 0.0) + new
    return x - lr * (m + (weight_decay * x if decoupled else 0.0))
