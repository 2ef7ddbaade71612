"""The LANS paper's arithmetic: schedule areas, stage lengths, the work it saves."""

from __future__ import annotations

import math

import pytest
from paper_facts import figure, the_row

from lbzoo.papers import find_rows


def learning_rate(t: int, peak: float, steps: int, warmup: int, constant: int = 0) -> float:
    """Equations 8 and 9 as printed."""
    if t <= warmup:
        return peak * t / warmup
    if t <= warmup + constant:
        return peak
    return peak * (steps - t) / (steps - warmup - constant)


def test_figure_1_areas() -> None:
    data = figure("lans/fig1")
    inputs, reported, computed = data["inputs"], data["reported"], data["computed"]
    steps, constant, low, high = inputs["T"], inputs["T_const"], inputs["eta_low"], inputs["eta_high"]
    area_high, area_low = high * steps / 2, low * steps / 2
    area_constant = low * (steps + constant) / 2
    assert area_high == pytest.approx(computed["area_eq8_eta_high"], abs=1e-9)
    assert area_low == pytest.approx(computed["area_eq8_eta_low"], abs=1e-9)
    assert area_constant == pytest.approx(computed["area_eq9_eta_low"], abs=1e-9)
    assert area_high - area_low == pytest.approx(reported["area_gap_eq8_vs_eq8"], abs=data["tolerance"])
    assert area_high - area_constant == pytest.approx(reported["area_gap_eq8_vs_eq9"], abs=data["tolerance"])


def test_figure_1_areas_summed_over_steps() -> None:
    inputs = figure("lans/fig1")["inputs"]
    steps, warmup, low, high = inputs["T"], inputs["T_warmup"], inputs["eta_low"], inputs["eta_high"]

    def area(peak: float, constant: int = 0) -> float:
        return sum(learning_rate(t, peak, steps, warmup, constant) for t in range(1, steps + 1))

    assert area(high) - area(low) == pytest.approx(5.28, abs=0.005)
    assert area(high) - area(low, inputs["T_const"]) == pytest.approx(1.91, abs=0.005)


def test_figure_1_ratios() -> None:
    inputs = figure("lans/fig1")["inputs"]
    assert 100 * inputs["T_warmup"] / inputs["T"] == pytest.approx(42.63, abs=0.005)
    assert 100 * (inputs["T_warmup"] + inputs["T_const"]) / inputs["T"] == pytest.approx(70.0, abs=0.01)


@pytest.mark.parametrize(("stage", "total_percent", "lamb_warmup_percent"), [(1, 70.0, 28.43), (2, 30.0, 12.8)])
def test_table_1_stage(stage: int, total_percent: float, lamb_warmup_percent: float) -> None:
    row = the_row("lans/1", stage=stage)
    warmup, constant = row["ratio_warmup_pct"], row["ratio_const_pct"]
    assert warmup + constant == pytest.approx(total_percent, abs=1e-9)
    assert warmup / 1.5 == pytest.approx(lamb_warmup_percent, abs=0.01)
    assert row["derived"]["warmup_steps"] == pytest.approx(row["steps"] * warmup / 100, abs=0.5)
    assert row["derived"]["const_steps"] == pytest.approx(row["steps"] * constant / 100, abs=0.5)
    assert sum(row["derived"].values()) == row["steps"]
    assert row["batch_size"] % 1536 == 0, "every one of the 1536 GPUs has an equal share"


def test_totals() -> None:
    stages = find_rows("lans/1")
    run = the_row("lans/2", optimizer="lans")
    assert sum(row["steps"] for row in stages) == run["steps"] == 4301
    assert 2 * run["steps"] == pytest.approx(the_row("lans/2", cited=True)["steps"], abs=4)
    sequences = sum(row["batch_size"] * row["steps"] for row in stages)
    assert sequences / (65536 * 7037 + 32768 * 1562) == pytest.approx(0.727, abs=5e-4)


def test_square_root_rule_at_128k() -> None:
    assert 0.005 * math.sqrt(131072 / 32768) == pytest.approx(figure("lans/fig1")["inputs"]["eta_high"])
