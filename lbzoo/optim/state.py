"""State of a parameter: how it is made, and loaded without losing precision."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from lbzoo.optim.elementwise import same_layout
from lbzoo.sharding import local


def state_dtype(param: Tensor) -> torch.dtype:
    """float32, or the parameter's own type where that has more precision."""
    return torch.promote_types(param.dtype, torch.float32)


def new_average(param: Tensor) -> Tensor:
    """A moving average like the parameter, sharded as it is."""
    return torch.zeros_like(param, dtype=state_dtype(param))


def new_layer_scalar(param: Tensor) -> Tensor:
    """A number kept for the whole tensor: 0-dim, the same on every rank."""
    return torch.zeros((), dtype=state_dtype(param), device=local(param).device)


def new_step_count() -> Tensor:
    """0-dim float32 on the host, where reading it costs nothing."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def load_with_precision(
    optimizer: Optimizer,
    load: Callable[[StateDict], None],
    state_dict: StateDict,
    keys: Collection[str] | None = None,
) -> None:
    """``load(state_dict)``, then put back what torch's loading took: it casts state to the type of the parameter.

    ``keys``: the names of the state to treat so; None for all of it.
    """
    seen: StateDict = {}

    def remember(_: Optimizer, loaded: StateDict) -> None:
        seen.update(loaded)

    handle = optimizer.register_load_state_dict_pre_hook(remember)  # after the hooks that may have changed it
    try:
        load(state_dict)
    finally:
        handle.remove()
    for saved_group, group in zip(seen["param_groups"], optimizer.param_groups, strict=True):
        for number, param in zip(saved_group["params"], group["params"], strict=True):
            for key, value in seen["state"].get(number, {}).items():
                if isinstance(value, Tensor) and (keys is None or key in keys):
                    optimizer.state[param][key] = _restored(key, value, param)


def _restored(key: str, value: Tensor, param: Tensor) -> Tensor:
    """A loaded value in the precision of the state, on the parameter's device and in its memory layout."""
    if key == "step":
        return value.to(device="cpu", dtype=torch.float32, copy=True)
    value = value.to(device=param.device, dtype=state_dtype(param), copy=True)
    if value.shape == param.shape and not same_layout(local(value), local(param)):
        return torch.empty_like(param, dtype=value.dtype).copy_(value)
    return value
