"""Numbers of half precision, where it would lose more than it has."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """The tensor in float32, or as it is where it has more precision. ``copy``: never the tensor itself."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)
