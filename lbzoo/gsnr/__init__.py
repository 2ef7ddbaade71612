"""The gradient signal-to-noise ratio (GSNR) of every parameter, in any loop, on any number of devices."""

from __future__ import annotations

from lbzoo.gsnr.collector import GradientStats, attached_stats

__all__ = ["GradientStats", "attached_stats"]
