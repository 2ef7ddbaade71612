"""What the block-normalised and the wrapped rules come down to."""

from __future__ import annotations

import numpy as np


def adamw(x, g, state, *, lr, betas, eps, weight_decay):
    b1, b2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2
    return x - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * x)


def momentum(x, g, state, *, lr, momentum, weight_decay):
    buffer = state["buffer"] = momentum * state.get("buffer", 0.0) + g + weight_decay * x
    return x - lr * buffer
