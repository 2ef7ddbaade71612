"""Samples of a linear function with noise: the problem on which VRGD looks at single weights (section 7.2)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.data.rng import stable_rng
from lbzoo.errors import UsageError
from lbzoo.registry import register_data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@register_data("linear_regression")
class LinearRegression(DataSource):
    """y = 1 x_1 + 2 x_2 + ... + dim x_dim + noise, drawn, not loaded.

    A micro-batch is (x [N, dim] float32, y [N] float32). ``inputs``: the distribution of each x_i, normal(0, 1) or
    uniform(0, 1). ``noise``: standard deviation of what is added to y, in training and in validation. ``data_seed``
    draws another set; the run's seed only orders it.
    """

    in_memory = True
    preshuffled = True
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        dim: int = 10,
        inputs: Literal["normal", "uniform"] = "normal",
        noise: float = 1.0,
        num_train: int = 204_800,
        num_val: int = 10_000,
        data_seed: int = 0,
    ) -> None:
        for name, size in {"dim": dim, "num_train": num_train, "num_val": num_val}.items():
            if size < 1:
                raise UsageError(f"data linear_regression: {name} must be at least 1, got {size}")
        if noise < 0:
            raise UsageError(f"data linear_regression: noise must be at least 0, got {noise}")
        self.dim, self.inputs, self.noise, self.data_seed = dim, inputs, noise, data_seed
        self._sizes = (num_train, num_val)

    def facts(self) -> DataFacts:
        return DataFacts(*self._sizes, None, (self.dim,), "samples")

    def prepare(self) -> None:
        """Nothing can be missing."""

    def train_dataset(self, *, seed: int = 0) -> TensorSamples:
        return self._splits[0]

    def val_dataset(self) -> TensorSamples:
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[TensorSamples, TensorSamples]:
        import torch

        splits = []
        for index, size in enumerate(self._sizes):
            x, y = draw(size, self.dim, self.inputs, self.noise, stable_rng(self.data_seed, index))
            splits.append(TensorSamples(torch.from_numpy(x).float(), torch.from_numpy(y).float()))
        return splits[0], splits[1]


def draw(
    samples: int, dim: int, inputs: Literal["normal", "uniform"], noise: float, rng: np.random.RandomState
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(x [samples, dim], y [samples])."""
    import numpy as np

    x = rng.standard_normal((samples, dim)) if inputs == "normal" else rng.random_sample((samples, dim))
    return x, x @ np.arange(1.0, dim + 1) + noise * rng.standard_normal(samples)
