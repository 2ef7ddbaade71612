"""Steps on a CPU that go from tensor to tensor, with their scalars as Python's numbers.

A rule on lists (see ``rules``) does some fifteen operations on lists of norms between its passes over memory. On a CPU
each takes 10 us there, for the weights that stream through the caches have driven the interpreter out of them: a fifth
of a step of LAMB. So the rules that matter most have a second form, a function of one tensor, for plain tensors on a
CPU whose layouts agree. It is built on torch's fused kernels; what they cannot take goes through the rule on lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lbzoo.optim import elementwise
from lbzoo.optim.batch import Batch
from lbzoo.optim.elementwise import flat_views

# Called with (state, parameter, gradient, averages...), the tensors as flat views in the order of memory.
TensorStep: TypeAlias = Callable[..., None]


def split_flat(batch: Batch, averages: Sequence[str]) -> tuple[list[list[Tensor]], Batch, Batch | None]:
    """(the flat views of each tensor that has them, the batch of those tensors, the batch of the others if any).

    ``averages``: the keys of the state that is laid out like the parameter.
    """
    columns = [batch.params, batch.grads, *(batch.state(key) for key in averages)]
    views = [_flat(tensors) for tensors in zip(*columns, strict=True)]
    flat = [view for view in views if view is not None]
    if len(flat) == len(views):
        return flat, batch, None
    fits = [index for index, view in enumerate(views) if view is not None]
    others = [index for index, view in enumerate(views) if view is None]
    return flat, batch.part(fits), batch.part(others)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """None as well where the types differ: the kernels take one."""
    return flat_views(tensors) if len({tensor.dtype for tensor in tensors}) == 1 else None


def pieces(*flat: Tensor) -> list[tuple[Tensor, ...]]:
    """Equal parts of flat tensors, short enough to be found in the cache by the next operation."""
    count = -(-flat[0].numel() // elementwise.PIECE)
    return [flat] if count <= 1 else list(zip(*(tensor.chunk(count) for tensor in flat), strict=True))


def square_sum(flat: Tensor) -> float:
    return torch.dot(flat, flat).item()


def norm(flat: Tensor) -> float:
    """The 2-norm, its pieces added up in double precision."""
    total = 0.0
    for (piece,) in pieces(flat):
        total += square_sum(piece)
    return math.sqrt(total)
