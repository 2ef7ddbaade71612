"""LARC: any optimizer, with each layer's gradient scaled so that the layer's learning rate stays below LARS's.

You, Gitman, Ginsburg (arXiv 1708.03888) in the clipped form that NVIDIA's mixed-precision libraries and the NovoGrad
paper (arXiv 1905.11286, section 4.3) train with. For a parameter tensor x with gradient g, the optimizer inside sees::

    g * min(trust_coefficient |x| / (|g| + weight_decay |x|) / lr, 1)          g where |x| or |g| is 0

``weight_decay`` and ``lr`` are those of the optimizer inside, which applies them as it always does.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lbzoo.optim.batch import Batch
from lbzoo.optim.elementwise import as_column, sweep
from lbzoo.optim.info import register_optimizer_wrapper
from lbzoo.optim.lars import local_rates
from lbzoo.optim.rules import Rule
from lbzoo.optim.wrapper import OptimizerWrapper


@register_optimizer_wrapper("larc_", paper="arXiv 1708.03888", equation="clipped local rates", layerwise=True)
class Larc(OptimizerWrapper):
    """LARC: gradients scaled by layer so that no local learning rate is above LARS's.

    Its statistics are those of the optimizer inside and ``larc_scale``, the factor on the gradient, which is also the
    ``trust_ratio`` where the optimizer inside has none. Raises UsageError for values out of range.
    """

    def __init__(self, base: Optimizer, *, trust_coefficient: float = 0.001) -> None:
        super().__init__(base, {"trust_coefficient": trust_coefficient})

    def rule(self, batch: Batch) -> Rule:
        param_norms, grad_norms = yield sweep(None, [batch.params, batch.grads], norms_of=[0, 1])
        weight_decay = batch.group.get("weight_decay", 0.0)
        rates = local_rates(param_norms, grad_norms, batch.group["trust_coefficient"], weight_decay)
        undefined = (param_norms == 0) | (grad_norms == 0)
        scales = torch.where(undefined, 1.0, (rates / batch.lr).clamp(max=1.0))
        batch.grads = list(torch._foreach_mul(batch.grads, as_column(scales, batch.grads)))
        return {"trust_ratio": scales, "larc_scale": scales}
