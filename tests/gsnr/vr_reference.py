"""VRGD and five rules to put it around, in double precision and from the papers' formulas: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Step = Callable[[Array, Array, Array, dict[str, Any]], Array]  # (x, gradient, gradient of v, options) -> x


def ratios(gradients: Array, gamma: float, cap: float | None, resolution: float) -> Array:
    """r of algorithm 1, from [k, *shape]. ``resolution``: the least variance as a part of the squared mean."""
    mean = gradients.mean(0)
    variance = np.maximum((gradients**2).mean(0) - mean**2, resolution * mean**2)
    seen = np.any(gradients != 0, axis=0)
    r = np.divide(mean**2, variance, out=np.ones_like(mean), where=seen)
    if cap is not None:
        r = np.where(seen, np.minimum(r, cap), r)
    if seen.any():
        r = np.where(seen, r / r[seen].mean(), 1.0)
    return np.clip(r, gamma, 1.0)


class Reference:
    """One parameter tensor trained by ``vr_<base>``."""

    def __init__(
        self,
        base: str,
        x: Array,
        *,
        gamma: float = 0.1,
        beta3: float | None = None,
        gsnr_cap: float | None = None,
        second_moment: str = "adapted",
        resolution: float,
        **options: Any,
    ) -> None:
        self.x, self.rule, self.options = x.copy(), RULES[base](), options
        self.gamma, self.cap, self.raw, self.resolution = gamma, gsnr_cap, second_moment == "raw", resolution
        self.beta3 = beta3 if beta3 is not None else 0.9 if "betas" in options else 0.0
        self.p, self.t = np.zeros_like(x), 0

    def step(self, gradients: Sequence[Array]) -> None:
        g = np.stack(gradients)
        self.t += 1
        self.p = self.beta3 * self.p + (1 - self.beta3) * ratios(g, self.gamma, self.cap, self.resolution)
        adapted = self.p / (1 - self.beta3**self.t) * g.mean(0)
        self.x = self.rule(self.x, adapted, g.mean(0) if self.raw else adapted, self.options)


def sgd() -> Step:
    return lambda x, g, _, o: x - o["lr"] * g


def momentum() -> Step:
    buffer: Any = 0.0

    def step(x: Array, g: Array, _: Array, o: dict[str, Any]) -> Array:
        nonlocal buffer
        buffer = o["momentum"] * buffer + g + o["weight_decay"] * x
        return x - o["lr"] * buffer

    return step


def lars() -> Step:
    buffer: Any = 0.0

    def step(x: Array, g: Array, _: Array, o: dict[str, Any]) -> Array:
        nonlocal buffer
        norm_x, norm_g = np.linalg.norm(x), np.linalg.norm(g)
        q = o["trust_coefficient"] * norm_x / (norm_g + o["weight_decay"] * norm_x) if norm_x and norm_g else 1.0
        buffer = o["momentum"] * buffer + o["lr"] * q * (g + o["weight_decay"] * x)
        return x - buffer

    return step


class _Moments:
    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def direction(self, g: Array, g_of_v: Array, o: dict[str, Any]) -> Array:
        (b1, b2), self.t = o["betas"], self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g_of_v**2
        return self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + o["eps"])


def adam() -> Step:
    moments = _Moments()
    return lambda x, g, g_of_v, o: x - o["lr"] * moments.direction(g, g_of_v, o)


def lamb() -> Step:
    moments = _Moments()

    def step(x: Array, g: Array, g_of_v: Array, o: dict[str, Any]) -> Array:
        u = moments.direction(g, g_of_v, o) + o["weight_decay"] * x
        norm_x, norm_u = np.linalg.norm(x), np.linalg.norm(u)
        return x - o["lr"] * (norm_x / norm_u if norm_x and norm_u else 1.0) * u

    return step


RULES: dict[str, Callable[[], Step]] = {"sgd": sgd, "momentum": momentum, "lars": lars, "adam": adam, "lamb": lamb}
