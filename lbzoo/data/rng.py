"""Random numbers that are the same in every version of the libraries, on every platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def stable_rng(*key: int) -> np.random.RandomState:
    """A generator of its own for every key (integers from 0 to 2^32 - 1), such as (seed, epoch, shard).

    numpy's RandomState is frozen for good (NEP 19), which neither torch's generators nor numpy's new ones are: a run
    that is resumed after an upgrade still sees the samples it would have seen.
    """
    import numpy as np

    return np.random.RandomState(list(key))


def stable_uniform(*key: int | NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Numbers from 0 up to 1, a function of the key alone: one for each element of the shape that its parts share.

    For whole batches, where a generator for each sample would take longer than the work: the 64-bit finaliser of
    SplitMix64 (Steele, Lea, Flood 2014), chained over the parts (integers from 0 to 2^63 - 1).
    """
    import numpy as np

    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        for part in key:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53)
