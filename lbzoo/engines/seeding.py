"""Random numbers as arithmetic: the state of every generator follows from (seed, step, micro-batch).

Before each micro-batch the generators are seeded from its place in the run. So dropout does not depend on how many
devices share a global batch, and a resumed run needs no stored generator state.
"""

from __future__ import annotations

import random

import torch

_MASK = (1 << 64) - 1


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """A 63-bit seed for micro-batch ``micro_batch`` (counted over all ranks) of optimizer step ``step`` (0-based)."""
    state = 0
    for word in (seed, step, micro_batch):
        # splitmix64: neighbouring counters give unrelated seeds.
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch (the CPU's generator and the current device's) and Python for one micro-batch."""
    value = micro_batch_seed(seed, step, micro_batch)
    # torch.manual_seed also visits every back-end that is not in use: 80 us a call against 6.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    random.seed(value)
