"""Schedules against the papers' equations, written out by hand, and against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from lbzoo.errors import UsageError
from lbzoo.papers import find_rows, load_paper
from lbzoo.registry import schedules
from lbzoo.schedules import Phases, Schedule, build_schedule


def build(name: str, steps: int = 100, steps_per_epoch: float = 10.0, **options: object) -> Schedule:
    return build_schedule(name, steps=steps, steps_per_epoch=steps_per_epoch, **options)


def values(schedule: Schedule) -> list[float]:
    return [schedule(t) for t in range(1, schedule.steps + 1)]


def eq_9(t: int, total: int, warmup: int, constant: int) -> float:
    """LANS equation 9 with a peak of 1; equation 8 is the case of no constant stretch."""
    if t <= warmup:
        return t / warmup
    if t <= warmup + constant:
        return 1.0
    return (total - t) / (total - warmup - constant)


def test_areas_of_lans_figure_1() -> None:
    figure = load_paper("lans")["figures"][0]
    given, reported = figure["inputs"], figure["reported"]
    phases = {"warmup_steps": given["T_warmup"]}
    eq8 = build("warmup_constant_linear", given["T"], **phases)
    eq9 = build("warmup_constant_linear", given["T"], **phases, constant_steps=given["T_const"])
    high, low = given["eta_high"] * sum(values(eq8)), given["eta_low"] * sum(values(eq8))
    assert high - low == pytest.approx(reported["area_gap_eq8_vs_eq8"], abs=0.005)
    assert high - given["eta_low"] * sum(values(eq9)) == pytest.approx(reported["area_gap_eq8_vs_eq9"], abs=0.005)


@pytest.mark.parametrize("stage", [0, 1])
def test_lans_table_1(stage: int) -> None:
    row = find_rows("lans/1")[stage]
    schedule = build(
        "warmup_constant_linear",
        row["steps"],
        warmup_ratio=row["ratio_warmup_pct"] / 100,
        constant_ratio=row["ratio_const_pct"] / 100,
    )
    warmup, constant = row["derived"]["warmup_steps"], row["derived"]["const_steps"]
    assert (schedule.warmup_steps, schedule.constant_steps) == (warmup, constant) == [(1501, 962), (150, 84)][stage]
    expected = [eq_9(t, row["steps"], warmup, constant) for t in range(1, row["steps"] + 1)]
    assert values(schedule) == pytest.approx(expected, abs=1e-12)


def test_linear_decay_is_equation_8() -> None:
    linear = build("polynomial", 50, warmup_steps=7)
    assert values(linear) == pytest.approx([eq_9(t, 50, 7, 0) for t in range(1, 51)], abs=1e-12)
    assert values(linear) == values(build("warmup_constant_linear", 50, warmup_steps=7))


def test_decay_from_the_start_is_lamb_section_4() -> None:
    schedule = build("polynomial", 100, warmup_steps=20, decay_from="start")
    assert values(schedule)[:20] == pytest.approx([t / 20 for t in range(1, 21)])
    assert values(schedule)[20:] == pytest.approx([1 - t / 100 for t in range(21, 101)])
    assert schedule(20) == 1
    assert schedule(21) == pytest.approx(0.79)


def torch_multipliers(steps: int, make: type, **options: object) -> list[float]:
    """What a torch scheduler multiplies the rate by in its steps 1..T (its own count starts at 0)."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make(optimizer, **options)
    seen = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
    return seen


def test_cosine_equals_torch() -> None:
    expected = torch_multipliers(40, torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40, eta_min=0.1)
    assert values(build("cosine", 40, end=0.1)) == pytest.approx(expected)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_polynomial_equals_torch(power: float) -> None:
    expected = torch_multipliers(40, torch.optim.lr_scheduler.PolynomialLR, total_iters=40, power=power)
    assert values(build("polynomial", 40, power=power)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["polynomial", "cosine"])
def test_decay_after_warmup_and_constant_is_the_whole_decay(name: str) -> None:
    shifted = build(name, 100, warmup_steps=20, constant_steps=30)
    assert values(shifted)[:20] == [t / 20 for t in range(1, 21)]
    assert values(shifted)[20:50] == [1.0] * 30
    assert values(shifted)[50:] == pytest.approx(values(build(name, 50)))


def test_nvidia_dlrm_schedule() -> None:
    """Warmup 8000, constant to 48000, quadratic decay over 24000 (papers/vrgd.yaml, external)."""
    schedule = build("polynomial", 72000, warmup_steps=8000, constant_steps=40000, power=2)
    assert schedule(48000) == 1
    assert schedule(60000) == pytest.approx(0.25)
    assert schedule(72000) == 0


def test_goyal_scheme() -> None:
    """5 epochs of warmup, times 0.1 at epochs 30, 60 and 80, on ImageNet at batch 16384 (LAMB tables 10, 12)."""
    per_epoch = 1281167 / 16384
    schedule = build("multistep", 7038, per_epoch, warmup_epochs=5, milestones=[30, 60, 80])
    assert schedule.warmup_steps == 391
    for t in range(1, 7039):
        epochs_before = (t - 0.5) / per_epoch  # the middle of the step
        if t > 391:
            expected = 0.1 ** sum(epochs_before > milestone for milestone in (30, 60, 80))
            assert schedule(t) == pytest.approx(expected), t
        else:
            assert schedule(t) == t / 391


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({"warmup_steps": 13}, 13),
        ({"warmup_epochs": 1.26}, 13),
        ({"warmup_ratio": 0.125}, 13),  # 12.5: a half goes up
        ({"warmup_ratio": 0.124}, 12),
        ({"warmup_ratio": 1.0}, 100),
        ({}, 0),
    ],
)
def test_units_of_warmup(given: dict[str, float], warmup: int) -> None:
    assert build("constant", 100, 10.0, **given).warmup_steps == warmup
    shape = build("polynomial", 100, 10.0, **{key.replace("warmup", "constant"): value for key, value in given.items()})
    assert shape.constant_steps == warmup


def test_phases_that_fill_the_run_are_rounded_to_fit() -> None:
    schedule = build("warmup_constant_linear", 3, warmup_ratio=0.5, constant_ratio=0.5)
    assert (schedule.warmup_steps, schedule.constant_steps) == (2, 1)
    assert values(schedule) == [0.5, 1, 1]


@pytest.mark.parametrize("name", ["constant", "polynomial", "cosine", "warmup_constant_linear"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs(name: str, steps: int) -> None:
    for warmup in range(steps + 1):
        assert all(0 <= value <= 1 for value in values(build(name, steps, warmup_steps=warmup)))


def test_a_scheduler_may_look_beyond_the_end_but_not_before_the_beginning() -> None:
    schedule = build("cosine", 10, end=0.25)
    assert schedule(11) == schedule(10) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="count from 1"):
        schedule(0)


def test_description() -> None:
    schedule = build("warmup_constant_linear", 3519, warmup_steps=1501, constant_steps=962)
    assert schedule.describe() == "1501 steps of warmup, 962 constant, 1056 of warmup_constant_linear"
    assert build("cosine").describe() == "100 of cosine"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"warmup_steps": 5, "warmup_ratio": 0.1}, "one of warmup_steps and warmup_ratio"),
        ("polynomial", {"constant_steps": 5, "constant_epochs": 1}, "one of constant_steps and constant_epochs"),
        ("cosine", {"warmup_steps": -1}, "warmup_steps must not be negative"),
        ("cosine", {"warmup_ratio": 1.1}, "warmup_ratio is a part of the run"),
        ("cosine", {"warmup_epochs": 10.1}, "warmup is longer than the run, 101 of 100"),
        ("cosine", {"warmup_steps": 60, "constant_steps": 41}, "warmup and constant stretch are longer than the run"),
        ("cosine", {"steps": 0}, "at least one optimizer step"),
        ("cosine", {"power": 2}, "no option 'power'; known: decay_from, end"),
        ("polynomial", {"pwer": 2}, "did you mean 'power'"),
        ("polynomial", {"power": 0}, "power must be above 0"),
        ("polynomial", {"end": 1.5}, "end is a part of the peak"),
        ("cosine", {"decay_from": "top"}, "decay_from is 'peak' or 'start', not 'top'"),
        ("cosine", {"decay_from": "start", "constant_steps": 5}, "after a constant stretch"),
        ("multistep", {}, "needs the option 'milestones'"),
        ("multistep", {"milestones": [60, 30]}, "rising epochs"),
        ("multistep", {"milestones": [0, 30]}, "rising epochs"),
        ("multistep", {"milestones": []}, "rising epochs"),
        ("multistep", {"milestones": [3], "warmup_epochs": 5}, "epoch 3 .* inside the warmup"),
        ("multistep", {"milestones": [3], "constant_epochs": 1}, "no gradual decay"),
        ("constant", {"decay_from": "start"}, "no option 'decay_from'"),
    ],
)
def test_mistakes(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, **options)


def test_a_schedule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_added", dict(schedules._added))

    @schedules.register("square_root")
    def square_root(phases: Phases, *, scale: float = 1.0):
        return lambda t: scale / math.sqrt(1 + 100 * phases.progress(t))

    schedule = build("square_root", 100, warmup_steps=10, scale=0.5)
    assert schedule(5) == 0.5
    assert schedule(100) == pytest.approx(0.5 / math.sqrt(101))


def test_a_polynomial_through_two_stages_is_one() -> None:
    whole = build_schedule("polynomial", steps=100, steps_per_epoch=10, warmup_steps=20)
    first = build_schedule("polynomial", steps=90, steps_per_epoch=10, warmup_steps=20, end=0.125)
    second = build_schedule("polynomial", steps=10, steps_per_epoch=10, begin=0.125)
    joined = [first(t) for t in range(1, 91)] + [second(t) for t in range(1, 11)]
    assert joined == pytest.approx([whole(t) for t in range(1, 101)], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 0.5, "warmup_steps": 1}, "no warmup"),
        ({"begin": 0.1, "end": 0.2}, "begin is a part"),
        ({"begin": 1.5}, "begin is a part"),
    ],
)
def test_where_a_polynomial_may_begin(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_schedule("polynomial", steps=10, steps_per_epoch=10, **options)  # type: ignore[arg-type]
