"""LANS on a CPU in two kernels that ``torch.compile`` makes, without temporaries.

Torch has no fused kernel for LANS, and ordinary operations write what they compute to memory and read it back. These
kernels keep both directions in registers: the first pass takes their norms, the second computes them again. One
compilation serves tensors of every length and all steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbzoo.errors import UsageError
from lbzoo.optim.by_tensor import pieces

Kernel = Callable[..., Any]


class CompiledPasses:
    """The passes of LANS over one tensor (see ``lans_by_tensor``)."""

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad_scale: float,
        step: float,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._pieces = pieces(param, grad, exp_avg, exp_avg_sq)
        # What the kernels read beside the tensors; in a tensor, because numbers would be compiled in.
        corrections = [1 / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5]
        values = [grad_scale, 1 - betas[0], 1 - betas[1], *corrections, eps, weight_decay]
        self._scalars = torch.tensor(values, dtype=param.dtype)

    def update_moments(self) -> tuple[float, float, float]:
        param_square = r_square = c_square = 0.0
        for piece in self._pieces:
            squares = _kernels()[0](*piece, self._scalars).tolist()
            param_square += squares[0]
            r_square += squares[1]
            c_square += squares[2]
        return param_square, r_square, c_square

    def add_step(self, r_factor: float, c_factor: float) -> None:
        factors = torch.tensor([r_factor, c_factor], dtype=self._scalars.dtype)
        for piece in reversed(self._pieces):  # from the end: there the cache is still warm
            _kernels()[1](*piece, self._scalars, factors)


def _moments_kernel(x: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: Tensor) -> Tensor:
    g = grad * scalars[0]
    new_m, new_v = m + scalars[1] * (g - m), v + scalars[2] * (g * g - v)
    m.copy_(new_m)
    v.copy_(new_v)
    inverse = 1 / (torch.sqrt(new_v) * scalars[4] + scalars[5])  # one division an element: they are what takes time
    decay = scalars[6] * x
    r, c = new_m * scalars[3] * inverse + decay, g * inverse + decay
    return torch.stack([(x * x).sum(), (r * r).sum(), (c * c).sum()])


def _step_kernel(x: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: Tensor, factors: Tensor) -> None:
    numerator = factors[0] * scalars[3] * m + factors[1] * scalars[0] * grad
    denominator = torch.sqrt(v) * scalars[4] + scalars[5]
    x.add_(numerator / denominator + (factors[0] + factors[1]) * scalars[6] * x)


@functools.cache
def _kernels() -> tuple[Kernel, Kernel]:
    return _compiled(_moments_kernel), _compiled(_step_kernel)


def _compiled(kernel: Kernel) -> Kernel:
    from torch._inductor.exc import InductorError

    # Without the option a kernel runs for ever on as many threads as there were when it was made, perhaps by an earlier
    # process: the compiler's cache does not tell them apart.
    made = torch.compile(kernel, dynamic=True, fullgraph=True, options={"cpp.dynamic_threads": True})

    def call(*tensors: Tensor) -> Any:
        try:
            return made(*tensors)
        except InductorError as error:
            raise UsageError(
                f"optimizer lans: compile=True found no working C++ compiler ({str(error).splitlines()[0]}); "
                "install one, or leave the option out: the eager step needs none"
            ) from error

    return call
