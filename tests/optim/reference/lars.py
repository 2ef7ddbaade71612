"""arXiv 1708.03888, algorithm 1, and the forms that lbzoo adds."""

from __future__ import annotations

import numpy as np


def lars(
    x,
    g,
    state,
    *,
    lr,
    momentum,
    weight_decay,
    trust_coefficient,
    nesterov=False,
    lr_in_momentum=True,
    clip=False,
    adapt=True,
):
    size_x, size_g = np.sqrt(np.sum(x**2)), np.sqrt(np.sum(g**2))
    q = trust_coefficient * size_x / (size_g + weight_decay * size_x) if size_x > 0 and size_g > 0 else 1.0
    if clip:
        q = min(q / lr, 1.0)
    if not adapt:
        q = 1.0
    inside, outside = (lr, 1.0) if lr_in_momentum else (1.0, lr)
    update = inside * q * (g + weight_decay * x)
    buffer = state["buffer"] = momentum * state.get("buffer", 0.0) + update
    return x - outside * (update + momentum * buffer if nesterov else buffer)
