"""Random numbers that are the same in every version of the libraries, on every platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stable_rng(*key: int) -> np.random.RandomState:
    """A generator of its own for every key (integers from 0 to 2^32 - 1), such as (seed, epoch, shard).

    numpy's RandomState is frozen for good (NEP 19), which neither torch's generators nor numpy's new ones are: a run
    that is resumed after an upgrade still sees the samples it would have seen.
    """
    import numpy as np

    return np.random.RandomState(list(key))
