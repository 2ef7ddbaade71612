"""N-LAMB (arXiv 1904.00962, algorithm 3): ``lamb`` with ``nesterov="first"`` and the paper's defaults."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from lbzoo.optim.info import register_optimizer
from lbzoo.optim.lamb import Lamb


@register_optimizer(
    "nlamb",
    paper="arXiv 1904.00962",
    equation="algorithm 3",
    aliases=("n-lamb",),
    lr_scaling="sqrt",
    state_per_param=2,
    layerwise=True,
)
def nlamb(
    params: ParamsT,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.975, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    adapt: bool = True,
    norm_order: float = 2.0,
    weight_norm_range: tuple[float, float] | None = None,
) -> Lamb:
    """LAMB with Nadam's look-ahead in the first moment; options as in lamb."""
    return Lamb(
        params,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        nesterov="first",
        adapt=adapt,
        norm_order=norm_order,
        weight_norm_range=weight_norm_range,
    )
