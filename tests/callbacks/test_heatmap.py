"""The history stays bounded and covers the whole run; the picture shows it."""

from __future__ import annotations

import numpy as np
import pytest

from lbzoo.callbacks.heatmap import History, draw

DARK, BRIGHT, GREY = [68, 1, 84], [253, 231, 37], [160, 160, 160]


@pytest.mark.parametrize("added", [1, 7, 8, 9, 100, 1000])
def test_history_is_bounded_and_evenly_spread(added: int) -> None:
    history = History(["a"], capacity=8)
    for step in range(added):
        history.add(step, {"a": float(step)})
    assert min(added, 5) <= len(history.steps) <= 8
    assert history.steps[0] == 0
    assert len(set(np.diff(history.steps))) <= 1
    assert history.steps[-1] > added - 1 - max(np.diff(history.steps), default=1)
    assert history.values_LT().tolist() == [list(map(float, history.steps))]


def test_a_run_of_any_length_is_drawn_a_few_times() -> None:
    history, drawn = History(["a"]), []
    for step in range(1, 2001):
        history.add(step, {"a": 1.0})
        if history.has_grown():
            history.values_LT()
            drawn.append(step)
    assert drawn[:6] == [1, 2, 3, 5, 8, 12]
    assert len(drawn) < 20
    assert history.has_undrawn()


def test_the_smallest_is_dark_the_largest_bright_a_missing_one_grey() -> None:
    history = History(["low", "middle", "high", "missing", "negative"])
    for step in range(100):
        history.add(step, {"low": 1e-3, "middle": 1.0, "high": 1e3, "negative": -1.0})
    image = draw(history)
    assert image.dtype == np.uint8
    body = np.argwhere((image == DARK).all(axis=-1))
    top, left = body[0]
    colours = [image[top + 17 * row + 8, left + 8].tolist() for row in range(5)]  # rows are 17 pixels high
    assert colours[0] == DARK
    assert colours[1] == pytest.approx([33, 144, 141], abs=2)  # viridis in the middle: the colour scale is logarithmic
    assert colours[2] == BRIGHT
    assert colours[3] == colours[4] == GREY


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (3, 2), (161, 320), (2000, 5)])
def test_any_shape_can_be_drawn(layers: int, columns: int) -> None:
    history = History([f"layer{index}.weight" for index in range(layers)])
    for step in range(columns):
        history.add(step, {name: float(index + 1) for index, name in enumerate(history.names)})
    height, width, channels = draw(history).shape
    assert channels == 3
    assert height >= 2 * layers
    assert width > 2 * columns


def test_a_history_without_any_value_is_drawn_too() -> None:
    history = History(["a"])
    history.add(1, {})
    assert draw(history).shape[2] == 3
