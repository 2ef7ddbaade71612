"""arXiv 1904.00962, algorithm 1."""

from __future__ import annotations

from reference.ratio import scaled_to_weights


def lars2020(x, g, state, *, lr, momentum, weight_decay, **ratio):
    m = state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * (g + weight_decay * x)
    return x - lr * scaled_to_weights(x, m, **ratio) * m
