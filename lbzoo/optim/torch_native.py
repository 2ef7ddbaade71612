"""torch's own optimizers under the names that recipes use. Their rules are torch's; ``torch:CLASS`` takes every option.

``fused=None`` leaves the choice of implementation to torch; ``fused=True`` is the quick one on CPU and CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from lbzoo.optim.checks import check_group
from lbzoo.optim.info import register_optimizer

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

T = TypeVar("T", bound=torch.optim.Optimizer)


def _checked(optimizer: T) -> T:
    """The optimizer; raises UsageError for values that torch lets pass, such as a learning rate that is NaN."""
    for index, group in enumerate(optimizer.param_groups):
        check_group(group, f"{type(optimizer).__name__}, parameter group {index}")
    return optimizer


@register_optimizer("sgd", lr_scaling="linear", state_per_param=0)
def sgd(params: ParamsT, *, lr: float = 1e-3, weight_decay: float = 0.0, fused: bool | None = None) -> torch.optim.SGD:
    """Stochastic gradient descent without momentum."""
    return _checked(torch.optim.SGD(params, lr=lr, weight_decay=weight_decay, fused=fused))


@register_optimizer("momentum", lr_scaling="linear", state_per_param=1)
def momentum(
    params: ParamsT,
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> torch.optim.SGD:
    """SGD with heavy-ball momentum, the learning rate outside the buffer."""
    return _checked(
        torch.optim.SGD(params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, fused=fused)
    )


@register_optimizer("nesterov", lr_scaling="linear", state_per_param=1)
def nesterov(
    params: ParamsT,
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> torch.optim.SGD:
    """SGD with Nesterov momentum."""
    return _checked(
        torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True, fused=fused)
    )


@register_optimizer("adagrad", lr_scaling="sqrt", state_per_param=1)
def adagrad(
    params: ParamsT,
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    fused: bool | None = None,
) -> torch.optim.Adagrad:
    """AdaGrad."""
    return _checked(
        torch.optim.Adagrad(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            fused=fused,
        )
    )


@register_optimizer("adam", lr_scaling="sqrt", state_per_param=2)
def adam(
    params: ParamsT,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    fused: bool | None = None,
) -> torch.optim.Adam:
    """Adam; its weight decay is an L2 term in the gradient."""
    return _checked(
        torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=fused)
    )


@register_optimizer("adamw", lr_scaling="sqrt", state_per_param=2)
def adamw(
    params: ParamsT,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay."""
    return _checked(
        torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=fused)
    )


@register_optimizer("nadam", lr_scaling="sqrt", state_per_param=2)
def nadam(
    params: ParamsT,
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> torch.optim.NAdam:
    """Adam with Nesterov momentum."""
    return _checked(
        torch.optim.NAdam(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )
    )
