"""Where the state of a run is shown: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

BAR_SECONDS = 1.0  # between two refreshes
FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 60.0  # between two lines, growing from the first to the second with the run


@dataclass(frozen=True)
class Status:
    """The state of a training. None: not known yet, or never."""

    step: int
    total: int | None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    loss: float | None = None
    lr: float | None = None
    validation: str | None = None  # of the last one
    micro_batches: tuple[int, int] = (0, 1)  # done of the coming step, and of how many

    def steps(self) -> str:
        done, of = self.micro_batches
        part = f", micro-batch {done}/{of}" if done else ""
        return f"step {self.step}" + (f"/{self.total}" if self.total else "") + part

    def completed(self) -> float:
        done, of = self.micro_batches
        return self.step + done / of

    def facts(self) -> str:
        parts = [
            None if self.samples_per_second is None else f"{rate_text(self.samples_per_second)}",
            None if self.seconds_left is None else f"{duration_text(self.seconds_left)} left",
            None if self.loss is None else f"loss {self.loss:.4g}",
            None if self.lr is None else f"lr {self.lr:.3g}",
            self.validation,
        ]
        return " · ".join(part for part in parts if part)


class Display(Protocol):
    """Where a Status goes."""

    smoothing: int  # number of refreshes that the shown rate is averaged over
    shows_micro_batches: bool  # whether to refresh within a step

    def is_due(self) -> bool:
        """Whether it is time for another refresh."""

    def show(self, status: Status) -> None:
        """Refresh."""

    def validating(self, done: int, total: int | None) -> None:
        """Refresh, while a validation runs: batches of this rank."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None: ...


def open_display(line_seconds: float | None = None) -> Display:
    """A bar where the output is a terminal; else lines, every ``line_seconds`` or at growing intervals."""
    console = Console()
    return Bar(console) if console.is_terminal else Lines(line_seconds)


class Lines:
    """A line now and then."""

    smoothing = 1
    shows_micro_batches = False

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._opened = time.monotonic()
        self._next = self._opened + (FIRST_LINE_SECONDS if seconds is None else seconds)

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, status: Status) -> None:
        self.say(" · ".join(filter(None, [status.steps(), status.facts()])))
        self._schedule()

    def validating(self, done: int, total: int | None) -> None:
        if done == 0:  # a short validation needs no line besides its results
            self._next = min(self._next, time.monotonic() + FIRST_LINE_SECONDS)
        elif self.is_due():
            self.say("validating" + (f": {done}/{total} batches" if total else ""))
            self._schedule()

    def say(self, text: str) -> None:
        with _forgiven():
            print(text, flush=True)

    def close(self) -> None:
        """Lines stay."""

    def _schedule(self) -> None:
        now = time.monotonic()
        growing = min(max((now - self._opened) / 10, FIRST_LINE_SECONDS), LINE_SECONDS)
        self._next = now + (growing if self._seconds is None else self._seconds)


class Bar:
    """A line that is written over."""

    smoothing = 10
    shows_micro_batches = True

    def __init__(self, console: Console) -> None:
        facts = TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            facts,
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=None, facts="")
        self._next = time.monotonic()
        self._bar.start()

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, status: Status) -> None:
        self._refresh(status.steps(), status.completed(), status.total, status.facts())

    def validating(self, done: int, total: int | None) -> None:
        self._refresh("validating", done, total, f"{done}/{total} batches" if total else "")

    def say(self, text: str) -> None:
        with _forgiven():
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        with _forgiven():
            self._bar.stop()

    def _refresh(self, description: str, completed: float, total: int | None, facts: str) -> None:
        self._bar.update(self._task, description=description, completed=completed, total=total, facts=facts)
        with _forgiven():
            self._bar.refresh()
        self._next = time.monotonic() + BAR_SECONDS


def _forgiven() -> AbstractContextManager[None]:
    """Around what writes: a full disk, a pipe or a terminal that is gone are no reason to end a training."""
    return suppress(OSError)


def duration_text(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds)))


def rate_text(samples_per_second: float) -> str:
    digits = f"{samples_per_second:,.0f}" if samples_per_second >= 100 else f"{samples_per_second:.3g}"
    return f"{digits} samples/s"
