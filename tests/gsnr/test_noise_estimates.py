"""The gradient noise scale on quadratics whose true one is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lbzoo.gsnr import GradientStats
from lbzoo.gsnr.noise import NoiseAverages

MICRO_BATCH_SIZE, MICRO_BATCHES = 4, 16
BATCH = MICRO_BATCH_SIZE * MICRO_BATCHES
SIZES = {"wide": 6000, "narrow": 2000}


class Quadratic(nn.Module):
    """0.5 |x - a|^2 with samples a: the gradient of one sample is x - a, its noise that of a.

    That of a micro-batch depends on the mean of its samples only, which is drawn as such.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = (nn.Parameter(torch.zeros(size)) for size in SIZES.values())

    def backward(self, means: dict[str, Tensor]) -> None:
        losses = [0.5 * (getattr(self, name) - a).square().sum() for name, a in means.items()]
        (sum(losses) / MICRO_BATCHES).backward()


def observe(scale: float, steps: int, decay: float = 0.99) -> GradientStats:
    """Signal of length 1 in all, "wide" with three quarters of its square; tr(S) = ``scale``, half of it in each."""
    generator = torch.Generator().manual_seed(0)
    signal = {"wide": math.sqrt(0.75 / SIZES["wide"]), "narrow": math.sqrt(0.25 / SIZES["narrow"])}
    spread = {name: math.sqrt(scale / 2 / size / MICRO_BATCH_SIZE) for name, size in SIZES.items()}
    model = Quadratic()
    stats = GradientStats(model, micro_batch_size=MICRO_BATCH_SIZE, noise_decay=decay)
    for _ in range(steps):
        model.zero_grad()
        for _ in range(MICRO_BATCHES):
            model.backward(
                {
                    name: signal[name] + spread[name] * torch.randn(size, generator=generator)
                    for name, size in SIZES.items()
                }
            )
        stats.observe_noise()
    return stats


@pytest.mark.parametrize(
    ("ratio", "steps", "decay"), [(0.1, 20, 0.99), (1.0, 40, 0.99), (10.0, 160, 0.99), (100.0, 1200, 0.998)]
)
def test_within_a_tenth_of_the_truth(ratio: float, steps: int, decay: float) -> None:
    """The larger the noise scale, the more steps it takes to see the signal: 5 % is one standard error of the last."""
    true = ratio * BATCH
    stats = observe(true, steps, decay)
    assert stats.noise_scale() == pytest.approx(true, rel=0.1)
    if ratio < 100:
        layers = stats.noise_scale_per_layer()
        assert layers["wide"] == pytest.approx(true / 2 / 0.75, rel=0.1)
        assert layers["narrow"] == pytest.approx(true / 2 / 0.25, rel=0.2)


def test_a_window_counts_once() -> None:
    stats = observe(BATCH, 1)
    first = stats.noise_scale()
    assert stats.noise_scale() == first
    stats.reset()
    assert stats.noise_scale() == first  # of what was observed before


def test_the_estimates_are_averaged_before_they_are_divided() -> None:
    """Steps in which no signal shows (|G|^2 below 0) count as much as others: that is what keeps it unbiased."""
    averages = NoiseAverages(decay=0.5)
    k, samples = 5, 40
    for squared_mean, variance in [(3.0, 8.0), (1.0, 12.0), (5.0, 4.0)]:
        averages.add(["layer"], torch.tensor([squared_mean]), torch.tensor([variance]), samples, k)
    signals, traces = [3 - 2, 1 - 3, 5 - 1], [80.0, 120.0, 40.0]
    weights = [0.25, 0.5, 1.0]
    expected = sum(w * t for w, t in zip(weights, traces, strict=True)) / sum(
        w * s for w, s in zip(weights, signals, strict=True)
    )
    assert averages.whole() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_overflowed_leaves_no_trace(bad: float) -> None:
    """Loss scaling makes them routine, and an average that has seen one infinity never forgets it."""
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    stats = GradientStats(model, micro_batch_size=4)
    seen = []
    for step in range(3):
        model.zero_grad()
        for part in range(8):
            loss = (model(torch.randn(4, 10)) - 1).square().mean() / 8
            (loss * bad if (step, part) == (1, 3) else loss).backward()
        seen.append((stats.noise_scale(), stats.noise_scale_per_layer()))
    assert 0 < seen[0][0] < math.inf
    assert seen[1] == seen[0]
    assert 0 < seen[2][0] < math.inf
    assert seen[2] != seen[0]


def test_nothing_is_known_of_an_overflow_in_the_first_step() -> None:
    averages = NoiseAverages(decay=0.5)
    averages.add(["layer"], torch.tensor([math.inf]), torch.tensor([math.nan]), 40, 5)
    assert math.isnan(averages.whole())
    averages.add(["layer"], torch.tensor([3.0]), torch.tensor([8.0]), 40, 5)
    assert averages.whole() == 80.0


def test_no_signal_and_no_noise() -> None:
    averages = NoiseAverages(decay=0.5)
    averages.add(["noise", "signal"], torch.tensor([1.0, 1.0]), torch.tensor([8.0, 0.0]), 40, 5)
    assert averages.per_layer() == {"noise": math.inf, "signal": 0.0}
