"""Layers x time as one image: how a quantity of every layer developed over the whole run.

The history is bounded. When it is full, every other column goes and from then on every other one is kept, so that a run
of any length is covered from its first step to its last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Nine colours of viridis, dark to bright; in between they are interpolated. Grey: no value.
_ANCHORS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
)
_NO_VALUE = (160, 160, 160)
_HEIGHT, _WIDTH = 480, 640  # pixels that the rows share, and that the columns share
_TEXT = 17  # pixels of a line of text


class History:
    """At most ``capacity`` columns of one number a layer (NaN where a layer has none)."""

    def __init__(self, names: Sequence[str], capacity: int = 320) -> None:
        self.names = list(names)
        self.steps: list[int] = []
        self._columns: list[list[float]] = []
        self._capacity = capacity
        self._stride = 1  # of what is added, every how many-th is kept
        self._added = self._drawn = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._added % self._stride == 0 and len(self.steps) == self._capacity:
            self.steps, self._columns = self.steps[::2], self._columns[::2]
            self._stride *= 2
        if self._added % self._stride == 0:
            self.steps.append(step)
            self._columns.append([values.get(name, math.nan) for name in self.names])
        self._added += 1

    def state(self) -> dict[str, Any]:
        """Plain values and a tensor, from which :meth:`load_state` goes on."""
        columns = torch.tensor(self._columns, dtype=torch.float64)
        counts = {"stride": self._stride, "added": self._added, "drawn": self._drawn}
        return {"names": list(self.names), "steps": list(self.steps), "columns": columns, **counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing is taken over from a history of other layers."""
        if state["names"] == self.names:
            self.steps, self._columns = list(state["steps"]), state["columns"].tolist()
            self._stride, self._added, self._drawn = state["stride"], state["added"], state["drawn"]

    def has_grown(self) -> bool:
        """Whether half as much again has been added since it was last drawn."""
        return self._added >= 1.5 * self._drawn and self.has_undrawn()

    def has_undrawn(self) -> bool:
        return self._added > self._drawn

    def values_LT(self) -> NDArray[np.float64]:
        """[layers, columns], to be drawn."""
        self._drawn = self._added
        return np.array(self._columns, dtype=np.float64).T


def draw(history: History) -> NDArray[np.uint8]:
    """The image [height, width, 3] of log10 of the history: first layer on top, time to the right, a colour bar."""
    from PIL import Image, ImageDraw, ImageFont

    with np.errstate(divide="ignore", invalid="ignore"):
        logs_LT = np.log10(history.values_LT())
    low, high = _bounds(logs_LT)
    layers, columns = logs_LT.shape
    height, width = max(2, min(_TEXT, _HEIGHT // layers)), max(2, min(4 * _TEXT, _WIDTH // columns))
    cells = _colours((logs_LT - low) / (high - low)).repeat(height, axis=0).repeat(width, axis=1)

    font = ImageFont.load_default(_TEXT - 3)
    left, top = max(int(font.getlength(name)) for name in history.names) + 8, _TEXT // 2
    bottom, right = top + cells.shape[0], left + cells.shape[1]
    below = max(bottom, top + 6 * _TEXT) + 6
    image = Image.new("RGB", (max(right + 5 * _TEXT, left + 12 * _TEXT), below + 2 * _TEXT), "white")
    image.paste(Image.fromarray(cells), (left, top))
    bar = _colours(np.linspace(1, 0, 6 * _TEXT)[:, None]).repeat(_TEXT, axis=1)
    image.paste(Image.fromarray(bar), (right + _TEXT, top))

    pen = ImageDraw.Draw(image)
    for row in range(0, len(history.names), -(-_TEXT // height)):  # names that do not overlap
        pen.text((left - 4, top + (row + 0.5) * height), history.names[row], "black", font, anchor="rm")
    for share, log in ((0.0, high), (0.5, (low + high) / 2), (1.0, low)):
        pen.text((right + 2 * _TEXT + 4, top + share * len(bar)), f"{10**log:.2g}", "black", font, anchor="lm")
    pen.text((left, below), f"steps {history.steps[0]} to {history.steps[-1]}", "black", font, anchor="la")
    return np.asarray(image)


def _bounds(logs: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """What the darkest and the brightest colour stand for: whole halves of a decade around 98 % of the values."""
    finite = logs[np.isfinite(logs)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.floor(np.quantile(finite, 0.01) * 2) / 2, np.ceil(np.quantile(finite, 0.99) * 2) / 2
    return float(low), float(max(high, low + 0.5))


def _colours(shares: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """[..., 3] colours of numbers in [0, 1]; outside: the nearest end; NaN, and the -inf of a zero's log: grey."""
    shades = np.linspace(0, len(_ANCHORS) - 1, 256)
    table = np.stack([np.interp(shades, range(len(_ANCHORS)), channel) for channel in _ANCHORS.T], axis=-1)
    colours: NDArray[np.uint8] = table.round().astype(np.uint8)[
        (np.nan_to_num(np.clip(shares, 0, 1)) * 255).round().astype(np.uint8)
    ]
    colours[~np.isfinite(shares)] = _NO_VALUE
    return colours
