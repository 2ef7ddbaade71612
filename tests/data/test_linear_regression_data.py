"""The linear regression's samples."""

from __future__ import annotations

import pytest
import torch

from lbzoo.data.linear_regression import LinearRegression
from lbzoo.errors import UsageError


@pytest.mark.parametrize("inputs", ["normal", "uniform"])
def test_the_weights_are_in_the_samples(inputs: str) -> None:
    source = LinearRegression(dim=4, inputs=inputs, noise=0.5, num_train=20_000, num_val=500)
    assert source.facts().input_shape == (4,)
    x, y = source.train_dataset().__getitems__(range(20_000))
    solution = torch.linalg.lstsq(x.double(), y.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(solution, torch.arange(1.0, 5.0).double(), rtol=0, atol=0.05)
    assert (y - x @ torch.arange(1.0, 5.0)).std().item() == pytest.approx(0.5, rel=0.03)
    mean, spread = (0.0, 1.0) if inputs == "normal" else (0.5, 12**-0.5)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(spread, rel=0.02)


def test_sets_differ_and_are_the_same_each_time() -> None:
    def first(**options: int) -> torch.Tensor:
        return LinearRegression(num_train=5, num_val=5, **options).train_dataset()[0][0]

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(data_seed=1))
    source = LinearRegression(num_train=5, num_val=5)
    assert not torch.equal(source.train_dataset()[0][0], source.val_dataset()[0][0])


@pytest.mark.parametrize(("option", "value"), [("dim", 0), ("num_train", 0), ("noise", -1.0)])
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"data linear_regression: {option} must be at least"):
        LinearRegression(**{option: value})
