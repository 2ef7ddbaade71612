"""How fast training goes: steps and samples, and the seconds spent on them with and without the pauses."""

from __future__ import annotations

import time
from typing import NamedTuple


class Reading(NamedTuple):
    """What a TrainingClock counted since it started."""

    steps: int = 0  # optimizer steps
    samples: int = 0
    seconds: float = 0.0  # spent training
    wall_seconds: float = 0.0  # pauses included


class TrainingClock:
    """Counts steps, samples and training time, from the end of the first optimizer step of this process.

    The first step also compiles, allocates and starts the data workers, and a resumed run has steps behind it that
    this process never made: neither belongs to the rate. Nor does a pause (a validation).
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._paused = 0.0  # seconds of all pauses so far
        self._pause_began: float | None = None
        self._reading = Reading()

    def count(self, samples: int) -> None:
        """One more optimizer step is done, on ``samples`` samples."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return
        wall = now - self._began
        steps, total = self._reading.steps + 1, self._reading.samples + samples
        self._reading = Reading(steps, total, wall - self._paused, wall)

    def pause(self) -> None:
        self._pause_began = time.monotonic()

    def resume(self) -> None:
        if self._began is not None and self._pause_began is not None:
            self._paused += time.monotonic() - self._pause_began
        self._pause_began = None

    def read(self) -> Reading:
        """As of the end of the last step."""
        return self._reading


def samples_per_second(earlier: Reading, later: Reading) -> float | None:
    """The rate between two readings; None where no sample lies between them."""
    samples, seconds = later.samples - earlier.samples, later.seconds - earlier.seconds
    return samples / seconds if samples > 0 and seconds > 0 else None


def seconds_left(reading: Reading, steps: int) -> float | None:
    """How long ``steps`` more will take at the pace so far, validations included; None before the second step."""
    return reading.wall_seconds / reading.steps * steps if reading.steps else None
