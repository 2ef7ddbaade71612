"""What a sweep varies: lists and ranges of a recipe's keys, and the points that are tried.

``optimizer.lr=1e-4,1e-3`` is a list, ``optimizer.weight_decay=log(1e-4,1e-1)`` a range (``log``, ``uniform``, ``int``),
anything else an override of every trial. Lists alone make a grid, tried in order; with a range the points are
quasi-random (scrambled Sobol), the same ones for the same seed however many are asked for.

Values of ``optimizer.name`` are the sweep's *arms*: each gets all the points. ``lamb:optimizer.lr=...`` is for one arm.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lbzoo.errors import UsageError, did_you_mean

ARM_KEY = "optimizer.name"
_RANGE = re.compile(r"([a-z]+)\((.*)\)")
_DIGITS = 4  # of a value drawn from a range: enough to tell trials apart, and readable


@dataclass(frozen=True)
class Choices:
    """Values of a key, as they would be written on the command line."""

    key: str
    values: tuple[str, ...]

    def at(self, u: float) -> str:
        """The value at u in [0, 1)."""
        return self.values[int(u * len(self.values))]


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, which belong to it; ``log``: each factor is as likely as another of its size."""

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, u: float) -> str:
        """The value at u in [0, 1)."""
        if self.whole:
            return str(int(self.low) + int(u * (int(self.high) - int(self.low) + 1)))
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        rounded = float(f"{value:.{_DIGITS}g}")
        return repr(min(max(rounded, self.low), self.high))


Dimension = Choices | Range
Point = Mapping[str, str]


@dataclass(frozen=True)
class Arm:
    """One optimizer of a sweep, or the sweep itself where it has but one: what is fixed and what varies."""

    name: str
    overrides: tuple[str, ...]
    dimensions: tuple[Dimension, ...]

    @property
    def grid_size(self) -> int | None:
        """The number of points of a grid; None where there is a range."""
        if any(isinstance(each, Range) for each in self.dimensions):
            return None
        return math.prod(len(each.values) for each in self.dimensions if isinstance(each, Choices))

    def points(self, trials: int | None, seed: int) -> list[Point]:
        """The first ``trials`` points; None means the whole grid. Raises UsageError."""
        size = self.grid_size
        if size is None and trials is None:
            raise UsageError("a range has no end of values: say how many to try with --trials")
        if size is not None and (trials is None or trials >= size):
            values = [each.values for each in self.dimensions if isinstance(each, Choices)]
            return [dict(zip(self._keys, point, strict=True)) for point in itertools.product(*values)]
        assert trials is not None
        return self._quasi_random(trials, seed)

    @property
    def _keys(self) -> list[str]:
        return [each.key for each in self.dimensions]

    def _quasi_random(self, trials: int, seed: int) -> list[Point]:
        from torch.quasirandom import SobolEngine

        engine = SobolEngine(len(self.dimensions), scramble=True, seed=seed)
        found: dict[tuple[str, ...], None] = {}
        while len(found) < trials:
            for coordinates in engine.draw(trials).tolist():  # a point of a list may come up again
                inside = [min(u, math.nextafter(1.0, 0.0)) for u in coordinates]
                found.setdefault(tuple(each.at(u) for each, u in zip(self.dimensions, inside, strict=True)))
            if engine.num_generated > 1000 * trials:
                raise UsageError(f"there are no {trials} different points in {', '.join(self._keys)}; lower --trials")
        return [dict(zip(self._keys, point, strict=True)) for point in list(found)[:trials]]


def parse_arms(words: Iterable[str]) -> list[Arm]:
    """The arms of a sweep from its command line. Raises UsageError."""
    plain: list[str] = []
    own: list[tuple[str, str]] = []
    for word in words:
        address, equals, value = word.partition("=")
        arm, colon, key = address.rpartition(":")
        if colon:
            own.append((arm, f"{key}{equals}{value}"))
        else:
            plain.append(word)
    shared = [_parse(word) for word in plain]
    arms = next((list(each.values) for each in shared if isinstance(each, Choices) and each.key == ARM_KEY), None)
    rest_of_all = [each for each in shared if not (isinstance(each, Choices) and each.key == ARM_KEY)]
    for name, word in own:
        if name not in (arms or ()):
            hint = did_you_mean(name, arms or ()) or f"; list the optimizers with {ARM_KEY}=A,B"
            raise UsageError(f"'{name}:{word}': no optimizer '{name}' in this sweep{hint}")
    if arms is None:
        return [_arm("sweep", [], rest_of_all)]
    return [
        _arm(name, [f"{ARM_KEY}={name}"], [*rest_of_all, *(_parse(word) for owner, word in own if owner == name)])
        for name in arms
    ]


def _arm(name: str, overrides: Sequence[str], parts: Sequence[str | Dimension]) -> Arm:
    """Of two dimensions of the same key the later one holds."""
    dimensions = {each.key: each for each in parts if not isinstance(each, str)}
    if not dimensions:
        raise UsageError("nothing varies; give a key a list (optimizer.lr=1e-3,1e-2) or a range (log(1e-4,1e-1))")
    fixed = tuple(each for each in parts if isinstance(each, str))
    return Arm(name, (*overrides, *fixed), tuple(dimensions.values()))


def _parse(word: str) -> str | Dimension:
    """An override, or what varies."""
    key, equals, text = word.partition("=")
    if not (key and equals):
        raise UsageError(f"'{word}': write key=value, key=value,value or key=log(low,high)")
    if (ranged := _RANGE.fullmatch(text.strip())) is not None:
        return _range(word, key, ranged[1], ranged[2])
    values = tuple(dict.fromkeys(part.strip() for part in _split(text)))
    if "" in values:
        raise UsageError(f"'{word}': a value of the list is empty")
    return Choices(key, values) if len(values) > 1 else word


def _range(word: str, key: str, kind: str, ends: str) -> Range:
    if kind not in ("log", "uniform", "int"):
        raise UsageError(f"'{word}': no range '{kind}'{did_you_mean(kind, ('log', 'uniform', 'int'))}")
    try:
        low, high = (float(end) for end in ends.split(","))
    except ValueError:
        raise UsageError(f"'{word}': a range has two numbers, as in {kind}(1,8)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"'{word}': the first end must be below the second")
    if kind == "log" and low <= 0:
        raise UsageError(f"'{word}': a log range lies above 0")
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise UsageError(f"'{word}': the ends of int(...) are whole numbers")
    return Range(key, low, high, log=kind == "log", whole=kind == "int")


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket and no quotes: ``[0.9,0.98],[0.9,0.999]`` are two values."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
