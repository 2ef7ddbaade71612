from __future__ import annotations

import numpy as np


def scaled_to_weights(x, u, norm_order=2.0, weight_norm_range=None, adapt=True):
    """phi(|x|) / |u|, with the norm taken over all elements; 1 where it is undefined or not wanted."""
    if not adapt:
        return 1.0
    size_x, size_u = (np.linalg.norm(np.ravel(array), norm_order) for array in (x, u))
    if weight_norm_range is not None:
        size_x = min(max(size_x, weight_norm_range[0]), weight_norm_range[1])
    return size_x / size_u if size_x > 0 and size_u > 0 else 1.0
