"""LARC: the gradient of any rule, scaled so that the local rate stays below LARS's."""

from __future__ import annotations

import numpy as np


def larc(rule):
    def scaled(x, g, state, *, trust_coefficient, lr, weight_decay, **options):
        size_x, size_g = np.sqrt(np.sum(x**2)), np.sqrt(np.sum(g**2))
        factor = 1.0
        if size_x > 0 and size_g > 0:
            factor = min(trust_coefficient * size_x / (size_g + weight_decay * size_x) / lr, 1.0)
        return rule(x, factor * g, state, lr=lr, weight_decay=weight_decay, **options)

    return scaled
