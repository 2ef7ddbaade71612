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
        self._steps = self._samples = 0
        self._began: float | None = None
        self._paused = 0.0  # seconds, of the pauses that are over
        self._pause_began: float | None = None

    def count(self, samples: int) -> None:
        """One more optimizer step is done, on ``samples`` samples."""
        if self._began is None:
            self._began = time.monotonic()
        else:
            self._steps += 1
            self._samples += samples

    def pause(self) -> None:
        if self._began is not None:
            self._pause_began = time.monotonic()

    def resume(self) -> None:
        if self._pause_began is not None:
            self._paused += time.monotonic() - self._pause_began
            self._pause_began = None

    def read(self) -> Reading:
        if self._began is None:
            return Reading()
        now = time.monotonic()
        pausing = now - self._pause_began if self._pause_began is not None else 0.0
        wall = now - self._began
        return Reading(self._steps, self._samples, wall - self._paused - pausing, wall)


def samples_per_second(earlier: Reading, later: Reading) -> float | None:
    """The rate between two readings; None where no sample lies between them."""
    samples, seconds = later.samples - earlier.samples, later.seconds - earlier.seconds
    return samples / seconds if samples > 0 and seconds > 0 else None


def seconds_left(reading: Reading, steps: int) -> float | None:
    """How long ``steps`` more will take at the pace so far, validations included; None before the second step."""
    return reading.wall_seconds / reading.steps * steps if reading.steps else None
