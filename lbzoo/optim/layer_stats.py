"""What a layer-wise step says of each parameter tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """One row a parameter tensor that had a gradient in the step, in the order of the optimizer's groups.

    ``names``: L names as in ``named_parameters`` ("group0.3" where the optimizer knows none). ``values``: by quantity,
    a tensor [L] on the parameters' device; under sharding the numbers of the whole tensor, the same on every rank.
    ``trust_ratio`` |x|/|u|, u the direction before scaling (LAMB, LARS: the factor applied); ``param_norm`` |x| before
    the step; ``grad_norm`` |g|; ``update_ratio`` |step|/|x|, 0 where |x| is 0. An optimizer may add others.
    """

    names: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
