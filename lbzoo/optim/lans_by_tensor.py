"""LANS on a CPU, a tensor at a time (see ``by_tensor``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lbzoo.optim.batch import Scratch
from lbzoo.optim.by_tensor import norm, pieces, square_sum
from lbzoo.optim.fused_kernels import adam_at_, add_quotient_
from lbzoo.optim.layerwise import inverse_norm, trust_ratio_of


class Passes(Protocol):
    """What is done to all elements of a tensor. It has two directions, r from the average and c from the gradient."""

    def update_moments(self) -> tuple[float, float, float]:
        """Update the moments; the squared norms of the parameter, of r and of c."""

    def add_step(self, r_factor: float, c_factor: float) -> None:
        """param += r_factor * r + c_factor * c."""


def lans_by_tensor(
    state: Mapping[str, Tensor],
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    make_passes: Callable[..., Passes],
    lr: float,
    betas: tuple[float, float],
    normalize_grad: bool,
    norm_eps: float,
    adapt: bool,
    weight_norm_range: tuple[float, float] | None,
    **adam: Any,
) -> None:
    """The rule for one tensor."""
    grad_scale = inverse_norm(norm(grad), norm_eps) if normalize_grad else 1.0
    passes = make_passes(param, grad, exp_avg, exp_avg_sq, grad_scale, state["step"].item(), betas=betas, **adam)
    param_norm, r_norm, c_norm = map(math.sqrt, passes.update_moments())
    r_ratio = trust_ratio_of(param_norm, r_norm, weight_norm_range) if adapt else 1.0
    c_ratio = trust_ratio_of(param_norm, c_norm, weight_norm_range) if adapt else 1.0
    passes.add_step(-lr * betas[0] * r_ratio, -lr * (1 - betas[0]) * c_ratio)


class EagerPasses:
    """The passes by torch's fused kernels, with r and c in scratch memory."""

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad_scale: float,
        step: float,
        *,
        scratch: Scratch,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        r, c = (scratch.flat(param.numel(), param.dtype, slot) for slot in (0, 1))
        self._pieces = pieces(param, grad, exp_avg, exp_avg_sq, r, c)
        self._scaled = scratch.flat(self._pieces[0][0].numel(), param.dtype, slot=2)
        self._grad_scale, self._weight_decay = grad_scale, weight_decay
        self._adam: dict[str, Any] = {"betas": betas, "eps": eps}
        self._time = torch.tensor(step)
        self._root = math.sqrt(1 - betas[1] ** step)

    def update_moments(self) -> tuple[float, float, float]:
        param_square = r_square = c_square = 0.0
        for x, grad, m, v, r, c in self._pieces:
            g = torch.mul(grad, self._grad_scale, out=self._scaled[: grad.numel()])
            torch.mul(x, self._weight_decay, out=r)
            c.copy_(r)
            adam_at_([r], [g], [m], [v], [self._time], lr=-1.0, **self._adam)
            self._add_gradient(c, g, v)
            param_square += square_sum(x)
            r_square += square_sum(r)
            c_square += square_sum(c)
        return param_square, r_square, c_square

    def _add_gradient(self, c: Tensor, g: Tensor, v: Tensor) -> None:
        """c += g / (sqrt(v_hat) + eps), where v_hat = v / root^2."""
        root, eps = self._root, self._root * self._adam["eps"]
        if c.dtype is torch.float32:
            add_quotient_([c], [g], [v], lr=-root, eps=eps)
        else:
            c.addcdiv_(g, v.sqrt().add_(eps), value=root)

    def add_step(self, r_factor: float, c_factor: float) -> None:
        for x, _, _, _, r, c in reversed(self._pieces):  # from the end: there the cache is still warm
            x.add_(r, alpha=r_factor)
            x.add_(c, alpha=c_factor)
