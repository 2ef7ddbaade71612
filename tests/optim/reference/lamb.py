"""arXiv 1904.00962, algorithms 2 to 4."""

from __future__ import annotations

import numpy as np

from reference.ratio import scaled_to_weights


def lamb(x, g, state, *, lr, betas, eps, weight_decay, bias_correction=True, nesterov=None, **ratio):
    b1, b2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2

    def correction(beta, step):
        return 1 - beta**step if bias_correction else 1.0

    if nesterov is None:
        mh, vh = m / correction(b1, t), v / correction(b2, t)
    else:
        mh = b1 * m / correction(b1, t + 1) + (1 - b1) * g / correction(b1, t)
        if nesterov == "first":
            vh = b2 * v / correction(b2, t)
        else:
            vh = b2 * v / correction(b2, t + 1) + (1 - b2) * g**2 / correction(b2, t)
    u = mh / (np.sqrt(vh) + eps) + weight_decay * x
    return x - lr * scaled_to_weights(x, u, **ratio) * u
