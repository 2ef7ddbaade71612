"""An optimizer of your own: LARS without weight decay, the trust ratio capped.

    m = momentum m + (1 - momentum) g        x = x - lr min(|x|/|m|, max_ratio) m

In a recipe: ``plugins: [./custom_optimizer.py]`` and ``optimizer: {name: capped_lars, lr: 0.01}``. Does it behave?
``lbzoo optim check ./custom_optimizer.py:CappedLars``. docs/custom_optimizer.md goes through it line by line.
"""

import torch

from lbzoo import register_optimizer
from lbzoo.optim.elementwise import add_scaled_, sweep
from lbzoo.optim.layerwise import LayerwiseOptimizer, trust_ratio
from lbzoo.optim.state import new_average


@register_optimizer("capped_lars", paper="this example", lr_scaling="sqrt", state_per_param=1, layerwise=True)
class CappedLars(LayerwiseOptimizer):
    """LARS without weight decay, the trust ratio capped."""

    def __init__(self, params, *, lr: float = 1e-2, momentum: float = 0.9, max_ratio: float = 10.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "max_ratio": max_ratio})

    def new_state(self, param, group):
        return {"average": new_average(param)}

    def rule(self, batch):
        averages = batch.state("average")

        def average(params, grads, averages):
            torch._foreach_lerp_(averages, grads, 1 - batch.group["momentum"])

        tensors = [batch.params, batch.grads, averages]
        param_norms, average_norms = yield sweep(average, tensors, norms_of=[0, 2])
        ratios = trust_ratio(param_norms, average_norms).clamp(max=batch.group["max_ratio"])
        add_scaled_(batch.params, (averages, -batch.lr * ratios))
        return {"trust_ratio": ratios, "step_norm": batch.lr * ratios * average_norms}
