"""What is kept of one parameter's gradients, and the arithmetic on it.

h_1 .. h_n are the gradients of one rank's backward passes, and ``p.grad`` is their sum S, under data parallelism its
mean over the ranks. Kept are the sum T of the squares h_j^2 (its mean over the ranks), element by element, and the norm
|S| when the last gradient came. The k gradients g_j that are spoken of elsewhere are n h_j: those of which ``p.grad``
is the mean. So their variance is n T - S^2. Where m passes are pooled into one gradient H, T takes H^2 / m.

Whoever unscales or clips multiplies ``p.grad`` by some number c afterwards. c is the norm now over the norm then, and
n T c^2 belongs to the gradient as it is now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lbzoo.sharding import local_gradient

PIECE = 1 << 20  # elements that stay in a CPU's cache while several operations pass over them


@dataclass(eq=False)
class GradientSums:
    """One parameter's sums in the window: the backward passes since the gradients were last set to None.

    ``pooled``: the sum of the gradients that will count as one, where several do. All tensors are this rank's parts.
    """

    name: str
    parameter: Tensor
    squares: Tensor | None = None
    count: int = 0  # backward passes
    groups: int = 0  # gradients that they were pooled into
    arrivals: int = 0  # backward passes of all windows
    norm: Tensor | None = None
    pooled: Tensor | None = None
    in_pool: int = 0

    def restart(self) -> None:
        self.squares = self.norm = self.pooled = None
        self.count = self.groups = self.in_pool = 0

    def add(self, gradient: Tensor, pool_size: int) -> None:
        """Take the gradient of one backward pass, before it is added to ``p.grad``."""
        if self.parameter.grad is None and self.count:
            self.restart()  # zero_grad() began another window, and nobody used the last: a step was skipped
        self.count += 1
        self.arrivals += 1
        if pool_size == 1:
            self._add_square(gradient, 1)
            return
        self.pooled = _like_state(gradient).clone() if self.pooled is None else self.pooled.add_(gradient)
        self.in_pool += 1
        if self.in_pool == pool_size:
            self.close_pool()

    def close_pool(self) -> None:
        """Count what is in the pool as one gradient; that of an incomplete pool weighs as much as its parts."""
        if self.in_pool and self.pooled is not None:
            self._add_square(self.pooled, self.in_pool)
        self.pooled, self.in_pool = None, 0

    def add_reduced(self, squares: Tensor, groups: int, passes: int) -> None:
        """Take, and keep, the squares of ``passes`` backward passes that were reduced over the ranks already."""
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        self.groups += groups
        self.count += passes
        self.arrivals += 1

    def seal(self) -> None:
        """``p.grad`` holds all gradients so far, and nothing has changed it yet."""
        self.norm = norm_of(local_gradient(self.parameter))

    @property
    def gradients(self) -> int:
        """In the window, that of an incomplete pool among them."""
        return self.groups + (self.in_pool > 0)

    @property
    def is_live(self) -> bool:
        """Whether the parameter has a gradient that these sums describe."""
        return self.parameter.grad is not None and self.norm is not None

    def factor(self) -> Tensor:
        """The number by which ``p.grad`` was multiplied since :meth:`seal`, 0-dim."""
        assert self.norm is not None
        now = norm_of(local_gradient(self.parameter))
        return torch.where(self.norm == 0, torch.ones_like(now), now / self.norm.to(now.device))

    def _add_square(self, gradient: Tensor, passes: int) -> None:
        gradient = _like_state(gradient)
        if self.squares is None:
            self.squares = gradient.square()
            if passes > 1:
                self.squares.div_(passes)
        else:
            self.squares.addcmul_(gradient, gradient, value=1 / passes)
        self.groups += 1


def norm_of(tensor: Tensor) -> Tensor:
    """The 2-norm, 0-dim, in float32 at least."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm


def variance(squares: Tensor, gradient: Tensor, count: int, factor: Tensor) -> Tensor:
    """n T c^2 - S^2, a new tensor, element by element."""
    return (squares * (count * factor.square()) - _like_state(gradient).square()).clamp_(min=0)


def gsnr_(squares: Tensor, gradient: Tensor, count: int, factor: Tensor) -> Tensor:
    """Turn ``squares`` into S^2 / (n T c^2 - S^2), in place: the GSNR of every element.

    NaN where there was no gradient at all. The variance is taken to be at least 8 eps S^2, which is what the type of
    ``gradient`` can resolve (1e-6 in float32), so the largest value is 1 / (8 eps), a power of two.
    """
    floor = 8 * torch.finfo(gradient.dtype).eps
    scale = count * factor.square()
    for piece, part in _pieces(squares, gradient):
        squared_mean = _like_state(part).square()
        piece.mul_(scale).sub_(squared_mean)
        torch.maximum(piece, squared_mean * floor, out=piece)
        torch.div(squared_mean, piece, out=piece)
    return squares


def _pieces(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching parts of two tensors of one shape: small ones on a CPU, where the layouts allow it."""
    if first.device.type != "cpu" or not (first.is_contiguous() and second.is_contiguous()):
        yield first, second
        return
    yield from zip(first.view(-1).split(PIECE), second.view(-1).split(PIECE), strict=True)


def _like_state(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
