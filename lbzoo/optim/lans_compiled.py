"""LANS on a CPU in two kernels that ``torch.compile`` makes, without temporaries.

Torch has no fused kernel for LANS, and ordinary operations write what they compute to memory and read it back. These
kernels keep both directions in registers: the first pass takes their norms, the second computes them again. One
compilation serves tensors of every length and all steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lbzoo.errors import UsageError
from lbzoo.optim.elementwise import PIECE, SMALL, Norms, is_dense, same_layout
from lbzoo.optim.lans_passes import Passes

Kernel = Callable[..., Any]


class CompiledPasses(Passes):
    """The passes of LANS with compiled kernels for large tensors. Small ones are not worth a call each."""

    def update_moments(self) -> Norms:
        self._prepare()
        norms = torch.zeros(3, len(self.params), dtype=torch.float64)
        for index in self._large:
            pieces = [_kernels()[0](*piece, self._scalars[index]) for piece in _pieces(self._tensors(index))]
            norms[:, index] = torch.stack(pieces).sum(0, dtype=torch.float64)
        if self._small:
            norms[:, self._small] = self._rest.update_moments().parts
        return Norms(norms)

    def add_step(self, targets: Sequence[Tensor], r_factors: Tensor, c_factors: Tensor) -> None:
        """As of Passes, for ``targets`` that are the parameters: the directions are computed again from them."""
        if self._small:
            small = [targets[index] for index in self._small]
            self._rest.add_step(small, r_factors[self._small], c_factors[self._small])
        factors = torch.stack([r_factors, c_factors], dim=1).to(self.params[0].dtype)
        for index in reversed(self._large):  # from the end: there the cache is still warm from the pass before
            own = factors[index].clone()  # each place in a longer tensor would be compiled for
            for piece in reversed(_pieces([targets[index], *self._tensors(index)[1:]])):
                _kernels()[1](*piece, self._scalars[index], own)

    def _prepare(self) -> None:
        """Tell large tensors from small ones, and put together what each kind needs."""
        self._large = [index for index in range(len(self.params)) if _is_worth_a_call(self._tensors(index))]
        scales = self.grad_scales if self.grad_scales is not None else [1.0] * len(self.params)
        self._scalars = {index: self._scalars_of(self.steps[index], scales[index]) for index in self._large}
        self._small = [index for index in range(len(self.params)) if index not in self._scalars]

        def of_small(column: Sequence[Any]) -> list[Any]:
            return [column[index] for index in self._small]

        params = of_small(self.params)
        self._rest = Passes(
            params,
            of_small(self.grads),
            of_small(self.moments[0]),
            of_small(self.moments[1]),
            of_small(self.steps),
            lambda slot: [torch.empty_like(param) for param in params],
            **self.options,
        )
        self._rest.grad_scales = of_small(scales)

    def _tensors(self, index: int) -> list[Tensor]:
        return [column[index] for column in (self.params, self.grads, *self.moments)]

    def _scalars_of(self, step: float, grad_scale: float) -> Tensor:
        """What the kernels read beside the tensors; in a tensor, because numbers would be compiled in."""
        beta1, beta2 = self.options["betas"]
        corrections = [1 / (1 - beta1**step), (1 - beta2**step) ** -0.5]
        values = [grad_scale, 1 - beta1, 1 - beta2, *corrections, self.options["eps"], self.options["weight_decay"]]
        return torch.tensor(values, dtype=self.params[0].dtype)


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


def _is_worth_a_call(tensors: Sequence[Tensor]) -> bool:
    """Whether the first is large, and all lie in memory in one order."""
    first, *others = tensors
    return first.numel() > SMALL and is_dense(first) and all(same_layout(first, other) for other in others)


def _pieces(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Flat views of equal parts of at most PIECE elements, in the order of memory."""
    size = tensors[0].numel()
    flat = [tensor.detach().as_strided((size,), (1,)) for tensor in tensors]
    return list(zip(*(tensor.chunk(-(-size // PIECE)) for tensor in flat), strict=True))
