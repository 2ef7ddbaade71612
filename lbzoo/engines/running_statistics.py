"""BatchNorm's running statistics across ranks.

Each rank's statistics follow its own micro-batches. Rank 0's alone are a sample of the data; validation and
checkpoints use the mean over ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def average_running_statistics(module: nn.Module) -> None:
    """Average every BatchNorm's running mean and variance over all ranks, in one all-reduce. Collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    buffers = [
        buffer
        for layer in module.modules()
        # SyncBatchNorm is one too: its ranks agree already, and the mean of equals is exact.
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.detach().float().view(-1) for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
