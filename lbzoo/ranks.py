"""Which process of torch.distributed this one is; a process of its own where there is no group."""

from __future__ import annotations

import torch.distributed as dist


def has_other_ranks() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
