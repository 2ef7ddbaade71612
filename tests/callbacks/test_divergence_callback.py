"""Divergence in anybody's Trainer: trust ratios that collapse, spikes, averages, and what it costs a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from plain_trainer import FakeLayerwise, Plain, adamw, fit
from torch import Tensor

from lbzoo.callbacks.divergence import Divergence, Finding, MovingAverage
from lbzoo.errors import DivergedError
from lbzoo.optim.layer_stats import LayerStats


class Collapsing(FakeLayerwise):
    """From the fifth step on its trust ratios are a hundred thousandth of what they were."""

    def layer_stats(self) -> LayerStats:
        factor = 1e-5 if self.steps >= 5 else 1.0
        ratios = self._stats.values["trust_ratio"] * factor
        return LayerStats(self._stats.names, {**self._stats.values, "trust_ratio": ratios})


def collapsing(module: torch.nn.Module) -> torch.optim.Optimizer:
    return Collapsing(list(module.named_parameters()), lr=0.01)


def test_trust_ratios_that_collapse() -> None:
    found: list[Finding] = []
    monitor = Divergence(every=1, on_bad_step=lambda finding: found.append(finding) or "")
    with pytest.raises(DivergedError, match="step 6: the trust ratios have collapsed"):
        fit(Plain(collapsing), monitor, max_steps=10)
    assert [finding.step for finding in found] == [6]
    assert all(layer.trust_ratio is not None and layer.trust_ratio > 0 for layer in found[0].layers)


@pytest.mark.parametrize("options", [{"trust_ratio_drop": None}, {"trust_ratio_drop": 1e-6}])
def test_unless_that_is_meant(options: dict[str, float | None]) -> None:
    fit(Plain(collapsing), Divergence(every=1, **options), max_steps=10)  # type: ignore[arg-type]


def test_an_ordinary_training_is_left_alone() -> None:
    monitor = Divergence(every=1)
    fit(Plain(adamw), monitor, max_steps=30)
    assert monitor.skipped == 0
    assert monitor.state_dict()["loss"][1] == 30


class Scripted(Plain):
    """Its losses are given."""

    def __init__(self, losses: Sequence[float]) -> None:
        super().__init__(adamw)
        self.losses = losses

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 0 * super().training_step(batch, batch_idx) + self.losses[self.global_step]


FALLING = [4.5] * 20 + [4.5 * 0.95**step for step in range(150)]  # to 0.002, and the average to 0.4


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([*FALLING, 4.4, 0.002, 0.002], None),  # one batch, and nothing has happened
        ([*FALLING, 5.0, 0.002, 0.002], 171),  # worse than it ever was
        ([*FALLING, *(0.01 * 2**k for k in range(14))], 180),  # it grows, and is 5.12
        ([4.5] * 30 + [44.0, 4.5], None),  # not ten times as much
        ([4.5] * 30 + [46.0, 4.5], 31),
        ([4.5] * 10 + [46.0] + [4.5] * 10, None),  # no average yet
    ],
)
def test_a_spike_is_above_the_average_and_above_the_beginning(losses: list[float], step: int | None) -> None:
    monitor = Divergence()
    if step is None:
        fit(Scripted(losses), monitor, max_steps=len(losses))
        return
    with pytest.raises(DivergedError, match=rf"step {step}: the loss is more than 10 times .* never been above 4\.5"):
        fit(Scripted(losses), monitor, max_steps=len(losses))


def test_the_state_comes_back() -> None:
    one, other = Divergence(every=1), Divergence(every=1)
    fit(Plain(adamw), one, max_steps=25)
    assert one.state_dict()["highest_loss"] > 0
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()


def test_a_moving_average_begins_as_a_mean() -> None:
    average = MovingAverage(0.9)
    for value in (1.0, 2.0, 6.0):
        average.add(value)
    assert average.value == pytest.approx(3.0)
    for _ in range(100):
        average.add(5.0)
    assert average.value == pytest.approx(5.0, abs=1e-3)


def test_the_worst_micro_batches() -> None:
    finding = Finding(1, "x", math.nan, 1.0, [[1.0, 2.0], [math.inf, 0.5]], [])
    assert finding.worst_micro_batches() == [(1, 0)]
    finite = Finding(1, "x", 9.0, 1.0, [[1.0, 2.0], [1.5, 0.5]], [])
    assert finite.worst_micro_batches() == [(0, 1)]
