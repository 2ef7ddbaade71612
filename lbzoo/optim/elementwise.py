"""Running elementwise kernels over lists of tensors, and the norms of what they leave.

A kernel is a function of lists of tensors (``kernel(params, grads, ...)``) that works in place and treats every
element alike. On an accelerator, on meta tensors and under ``torch.compile`` it runs once on the whole lists. On a CPU
the ``_foreach_`` operations make each step of a kernel a sweep over all memory, so there it runs on pieces of about a
million elements that stay in the cache, and the norms of a piece are taken while it is there. Smaller pieces lose more
to the cost of a call than they gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor

PIECE = 1 << 20  # elements
SMALL = 1 << 15  # elements up to which torch's operations use one thread

# One entry a parameter: tensors of the parameters' shapes, or numbers.
Column: TypeAlias = Sequence[Any]
Kernel: TypeAlias = Callable[..., object]


@dataclass(frozen=True)
class Norms:
    """Norms of this rank's parts of some tensors, in the form in which the parts of several ranks add up.

    ``parts`` [rows, tensors]: sums of squares for ``order`` 2, of absolute values for 1, the maximum for infinity.
    """

    parts: Tensor
    order: float = 2.0

    @property
    def reduce_op(self) -> str:
        return "max" if self.order == float("inf") else "sum"

    def root(self, parts: Tensor) -> Tensor:
        """The norms [rows, tensors], given ``parts`` put together over all ranks."""
        return parts.sqrt() if self.order == 2.0 else parts


def run(kernel: Kernel, columns: Sequence[Column], *, whole: bool = False) -> None:
    """``kernel(*columns)``. ``whole``: without cutting tensors, for a kernel that passes over memory but once."""
    if not on_eager_cpu(columns[0]):
        kernel(*columns)
        return
    for _, piece in _pieces(columns, math.inf if whole else PIECE):
        kernel(*piece)


def sweep(kernel: Kernel | None, columns: Sequence[Column], norms_of: Sequence[int], order: float = 2.0) -> Norms:
    """Run ``kernel(*columns)``, then take the norms of the columns with the indices ``norms_of``: a row each."""
    if not on_eager_cpu(columns[0]):
        if kernel is not None:
            kernel(*columns)
        return Norms(torch.stack([_parts(columns[index], order) for index in norms_of]), order)
    totals = [[0.0] * len(columns[0]) for _ in norms_of]
    for start, piece in _pieces(columns):
        if kernel is not None:
            kernel(*piece)
        for row, index in zip(totals, norms_of, strict=True):
            for position, part in enumerate(_host_parts(piece[index], order), start):
                row[position] = _combine(row[position], part, order)
    return Norms(torch.tensor(totals, dtype=torch.float64), order)


def add_scaled_(targets: Sequence[Tensor], *terms: tuple[Sequence[Tensor], Tensor]) -> None:
    """targets[i] += factors[i] * tensors[i] for each term (tensors, factors [tensors])."""
    if not on_eager_cpu(targets):
        for tensors, factors in terms:
            torch._foreach_addcmul_(list(targets), list(tensors), as_column(factors, targets))
        return
    columns: list[Column] = [targets]
    for tensors, factors in terms:
        columns += [tensors, as_column(factors, targets)]
    # From the end: there the cache is still warm from the pass before.
    for _, (target_piece, *term_pieces) in reversed(list(_pieces(columns))):
        for tensor_piece, factor_piece in zip(term_pieces[::2], term_pieces[1::2], strict=True):
            for target, tensor, factor in zip(target_piece, tensor_piece, factor_piece, strict=True):
                target.add_(tensor, alpha=factor)


def as_column(values: Tensor, tensors: Sequence[Tensor]) -> list[Any]:
    """``values`` [tensors] as numbers for a kernel on ``tensors``; as 0-dim tensors where reading them would wait."""
    if on_eager_cpu(tensors):
        return values.tolist()
    return list(values.to(tensors[0].dtype).unbind())


def on_eager_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether the host may read values at no cost: plain CPU tensors, outside ``torch.compile``."""
    return bool(tensors) and tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()


def _pieces(columns: Sequence[Column], limit: float | None = None) -> Iterator[tuple[int, list[Column]]]:
    """(index of the first tensor, columns) of pieces: several small tensors, one tensor, or a part of a large one."""
    limit = PIECE if limit is None else limit
    sizes = [tensor.numel() for tensor in columns[0]]
    start = 0
    while start < len(sizes):
        stop, total = start + 1, sizes[start]
        while stop < len(sizes) and total + sizes[stop] <= limit:
            total += sizes[stop]
            stop += 1
        rows = [column[start:stop] for column in columns]
        if stop > start + 1 or total <= limit:
            yield start, _flattened_where_needed(rows)
        else:
            yield from ((start, piece) for piece in _cut(rows, total))
        start = stop


def _flattened_where_needed(rows: list[Column]) -> list[Column]:
    if all(map(are_contiguous, rows)):
        return rows
    across = [_flat(list(items)) for items in zip(*rows, strict=True)]
    return [list(row) for row in zip(*across, strict=True)]


def _cut(rows: list[Column], size: int) -> Iterator[list[Column]]:
    """The one tensor of each row in equal parts of at most PIECE elements; whole where the layouts differ."""
    rows = _flattened_where_needed(rows)
    if not all(map(are_contiguous, rows)):
        yield rows
        return
    count = -(-size // PIECE)
    cut = [row[0].view(-1).chunk(count) if isinstance(row[0], Tensor) else repeat(row[0]) for row in rows]
    for parts in zip(*cut, strict=False):  # numbers repeat for ever
        yield [[part] for part in parts]


def are_contiguous(column: Column) -> bool:
    """Whether all tensors are, or it is a column of numbers."""
    return not isinstance(column[0], Tensor) or all(map(Tensor.is_contiguous, column))


def _flat(items: list[Any]) -> list[Any]:
    """The tensors as flat views where they have them; else as given."""
    views = flat_views([item for item in items if isinstance(item, Tensor)])
    if views is None:
        return items
    rest = iter(views)
    return [next(rest) if isinstance(item, Tensor) else item for item in items]


def flat_views(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """1-D views in the order of memory where all tensors share one dense layout (channels-last, say); else None."""
    first, *others = tensors
    if not is_dense(first) or not all(same_layout(first, other) for other in others):
        return None
    return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether elements at the same place in memory belong to each other."""
    return (first.is_contiguous() and second.is_contiguous()) or _layout(first) == _layout(second)


def _layout(tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.size(), strict=True) if size > 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _parts(tensors: Sequence[Tensor], order: float) -> Tensor:
    """[tensors]; see Norms. A tensor without elements has norm 0."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm([tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors], order, dtype)
    stacked = torch.stack(list(norms))
    return stacked.square() if order == 2.0 else stacked


def _host_parts(tensors: Sequence[Tensor], order: float) -> list[float]:
    """As :func:`_parts`, read at once. torch.dot uses all threads where norms use one, but is called once a tensor."""
    if order != 2.0:
        return _parts(tensors, order).tolist()
    by_dot = [tensor.numel() > SMALL for tensor in tensors] if len(tensors) > 1 else [True]
    small = [tensor for tensor, large in zip(tensors, by_dot, strict=True) if not large]
    rest = iter(_parts(small, order).tolist()) if small else iter(())
    return [_dot(tensor) if large else next(rest) for tensor, large in zip(tensors, by_dot, strict=True)]


def _dot(tensor: Tensor) -> float:
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat).item()


def _combine(total: float, part: float, order: float) -> float:
    if order != float("inf"):
        return total + part
    return part if part > total or part != part else total
