"""BatchNorm's running statistics across ranks.

Each rank's statistics follow its own micro-batches. Rank 0's alone are a sample of the data; validation and
checkpoints use the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbzoo.ranks import has_other_ranks


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Every BatchNorm's running mean and variance, by the name of the buffer."""
    # SyncBatchNorm is one too: its ranks agree already, and the mean of equals is exact.
    layers = {n: layer for n, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    return {
        f"{name}.{kind}" if name else kind: buffer
        for name, layer in layers.items()
        for kind in ("running_mean", "running_var")
        if (buffer := getattr(layer, kind)) is not None
    }


def average_running_statistics(module: nn.Module) -> None:
    """Average every BatchNorm's running mean and variance over all ranks, in one all-reduce. Collective."""
    average_over_ranks(running_statistics(module).values())


def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks: one all-reduce in float32 at least, none without tensors."""
    tensors = list(tensors)
    if not tensors or not has_other_ranks():
        return
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    flat = torch.cat([tensor.detach().to(dtype).view(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
