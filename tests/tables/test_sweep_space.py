"""What a sweep varies, and the points that come of it."""

from __future__ import annotations

import math

import pytest

from lbzoo.errors import UsageError
from lbzoo.tables.sweep_space import Choices, Range, parse_arms


def test_a_grid_in_order() -> None:
    (arm,) = parse_arms(["optimizer.lr=1e-4,1e-3", "optimizer.weight_decay=0,0.1", "epochs=3"])
    assert arm.overrides == ("epochs=3",)
    assert [tuple(point.values()) for point in arm.points(None, 0)] == [
        ("1e-4", "0"), ("1e-4", "0.1"), ("1e-3", "0"), ("1e-3", "0.1"),
    ]  # fmt: skip
    assert list(arm.points(None, 0)[0]) == ["optimizer.lr", "optimizer.weight_decay"]


def test_commas_in_brackets_and_quotes_part_nothing() -> None:
    (arm,) = parse_arms(
        ["optimizer.betas=[0.9,0.98],[0.9,0.999]", "schedule={name: cosine, end: 0.1},constant", "a='x,y',z"]
    )
    assert [each.values for each in arm.dimensions if isinstance(each, Choices)] == [
        ("[0.9,0.98]", "[0.9,0.999]"),
        ("{name: cosine, end: 0.1}", "constant"),
        ("'x,y'", "z"),
    ]


def test_fewer_trials_than_the_grid_are_different_points_spread_over_it() -> None:
    (arm,) = parse_arms(["a=" + ",".join(map(str, range(10))), "b=" + ",".join(map(str, range(10)))])
    points = [tuple(point.values()) for point in arm.points(20, 0)]
    assert len(set(points)) == 20
    assert {a for a, _ in points} == {b for _, b in points} == {str(digit) for digit in range(10)}


def test_ranges_are_covered_evenly() -> None:
    """Of 2^n Sobol points every interval of that length holds exactly one; random ones leave a third of them empty."""
    (arm,) = parse_arms(["lr=log(1e-4,1e-1)", "wd=uniform(0,1)", "k=int(1,8)"])
    points = arm.points(64, seed=1)
    log_cells = {int(64 * (math.log10(float(point["lr"])) + 4) / 3) for point in points}
    cells = {int(64 * float(point["wd"])) for point in points}
    assert len(log_cells) >= 62  # values are rounded to four digits, at the edge of a cell into the next
    assert len(cells) >= 62
    counts = [sum(point["k"] == str(k) for point in points) for k in range(1, 9)]
    assert counts == [8] * 8
    assert all(1e-4 <= float(point["lr"]) <= 1e-1 for point in points)


def test_points_are_the_seed_s_and_more_trials_extend_them() -> None:
    (arm,) = parse_arms(["lr=log(1e-4,1e-1)", "name=a,b,c"])
    assert arm.points(40, 3)[:10] == arm.points(10, 3)
    assert arm.points(10, 3) != arm.points(10, 4)


def test_optimizers_are_arms_with_the_same_points() -> None:
    words = ["optimizer.name=lamb,adamw", "optimizer.lr=log(1e-4,1e-1)", "adamw:optimizer.weight_decay=0.1", "epochs=2"]
    lamb, adamw = parse_arms(words)
    assert (lamb.name, lamb.overrides) == ("lamb", ("optimizer.name=lamb", "epochs=2"))
    assert adamw.overrides == ("optimizer.name=adamw", "epochs=2", "optimizer.weight_decay=0.1")
    assert lamb.points(8, 0) == adamw.points(8, 0)


def test_an_arm_s_own_range_holds_over_the_shared_one() -> None:
    words = ["optimizer.name=lamb,timm:lion", "optimizer.lr=log(1e-4,1e-1)", "timm:lion:optimizer.lr=log(1e-5,1e-3)"]
    lamb, lion = parse_arms(words)
    assert lamb.dimensions == (Range("optimizer.lr", 1e-4, 1e-1, log=True),)
    assert lion.dimensions == (Range("optimizer.lr", 1e-5, 1e-3, log=True),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing varies"),
        (["optimizer.lr=0.1"], "nothing varies"),
        (["optimizer.lr"], "write key=value, key=value,value or key=log"),
        (["lr=1e-3,,1e-2"], "a value of the list is empty"),
        (["lr=lg(1,2)"], r"no range 'lg'; did you mean 'log'\?"),
        (["lr=log(1)"], "a range has two numbers"),
        (["lr=log(1,a)"], "a range has two numbers"),
        (["lr=log(0,1)"], "a log range lies above 0"),
        (["lr=uniform(2,1)"], "the first end must be below the second"),
        (["k=int(1.5,3)"], "whole numbers"),
        (
            ["optimizer.name=lamb,adam", "adamw:optimizer.lr=1,2"],
            "no optimizer 'adamw' in this sweep; did you mean 'adam'",
        ),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arms(words)


def test_a_range_needs_a_number_of_trials() -> None:
    (arm,) = parse_arms(["lr=log(1e-4,1e-1)"])
    with pytest.raises(UsageError, match="say how many to try with --trials"):
        arm.points(None, 0)


def test_more_different_points_than_there_are() -> None:
    (arm,) = parse_arms(["k=int(1,3)"])
    with pytest.raises(UsageError, match="no 4 different points"):
        arm.points(4, 0)
