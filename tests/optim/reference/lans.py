"""arXiv 2006.13484, algorithm 2; equation 7 without the normalisation of the gradient."""

from __future__ import annotations

import numpy as np

from reference.ratio import scaled_to_weights


def normalised(g, norm_eps=0.0):
    size = np.sqrt(np.sum(g**2))
    return g / (size + norm_eps) if size > 0 else np.zeros_like(g)


def lans(x, g, state, *, lr, betas, eps, weight_decay, normalize_grad=True, norm_eps=0.0, **ratio):
    b1, b2 = betas
    if normalize_grad:
        g = normalised(g, norm_eps)
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2
    below = np.sqrt(v / (1 - b2**t)) + eps
    r = m / (1 - b1**t) / below + weight_decay * x
    c = g / below + weight_decay * x
    step = b1 * scaled_to_weights(x, r, **ratio) * r + (1 - b1) * scaled_to_weights(x, c, **ratio) * c
    return x - lr * step
