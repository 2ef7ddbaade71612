"""Parameters whose gradients cannot be seen, one backward pass at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lbzoo.errors import UsageError


def refuse_unseen(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: reason} of the parameters to leave out, after a warning that names them.

    Raises UsageError where nothing is left.
    """
    reasons = {id(parameter): reason for module in model.modules() for parameter, reason in _of_module(module)}
    left_out = {name: reasons[id(parameter)] for name, parameter in parameters.items() if id(parameter) in reasons}
    if not parameters:
        raise UsageError("GradientStats: the model has no parameter that requires a gradient")
    text = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    if len(left_out) == len(parameters):
        raise UsageError(f"GradientStats can see no gradient of this model: {text}")
    if left_out:
        warnings.warn(f"GradientStats leaves out {text}", UserWarning, stacklevel=3)
    return left_out


def _of_module(module: nn.Module) -> list[tuple[Tensor, str]]:
    """The module's own parameters that cannot be seen, and why."""
    own = list(module.parameters(recurse=False))
    if any(p.is_complex() for p in own):
        return [(p, "it is complex: train its torch.view_as_real()") for p in own if p.is_complex()]
    if type(module).__module__.startswith("fbgemm_gpu"):
        # All tables below it: their optimizer is fused into the backward pass.
        return [(p, f"{type(module).__name__} updates it inside the backward pass") for p in module.parameters()]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return [(p, "its gradient is sparse: give the embedding sparse=False") for p in own]
    if isinstance(module, DistributedDataParallel):
        ignored = module.parameters_to_ignore
        named = module.module.named_parameters()
        return [(p, "DistributedDataParallel was told to ignore it") for name, p in named if name in ignored]
    return [(p, "its optimizer runs inside the backward pass") for p in own if hasattr(p, "_in_backward_optimizers")]
