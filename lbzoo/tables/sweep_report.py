"""What a sweep came to: one table of all trials, the best first, as text and CSV, and its plots."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbzoo.data.extras import extra
from lbzoo.tables.sweep import Sweep, SweepResult
from lbzoo.tables.sweep_space import Range
from lbzoo.tables.sweep_study import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (4.0, 3.2)  # inches


def ranked(result: SweepResult) -> list[Trial]:
    """The trials, the best first; those without a value last."""
    sign = -1.0 if result.sweep.mode == "max" else 1.0
    return sorted(result.trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.point))


def varied_keys(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(each.key for arm in sweep.arms for each in arm.dimensions))


def summary(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    keys = varied_keys(result.sweep)
    arms = ["optimizer"] if len(result.sweep.arms) > 1 else []
    rows = []
    for rank, trial in enumerate(ranked(result), 1):
        value = f"{trial.value:.5g}" if trial.value is not None else trial.ending
        seconds = "" if trial.seconds is None else f"{trial.seconds:.0f}"
        cells = [str(rank), *([trial.arm] if arms else []), *(trial.values.get(key, "") for key in keys)]
        rows.append([*cells, value, seconds, trial.run or ""])
    return ["#", *arms, *keys, result.sweep.metric, "seconds", "run"], rows


def summary_data(result: SweepResult) -> dict[str, Any]:
    """The sweep as JSON-able data."""
    sweep = result.sweep
    return {
        "recipe": str(sweep.recipe),
        "scale": sweep.scale,
        "metric": sweep.metric,
        "mode": sweep.mode,
        "folder": str(sweep.folder),
        "budget": len(sweep.points[0]),
        "interrupted": result.interrupted,
        "trials": [
            {
                "optimizer": trial.arm if len(sweep.arms) > 1 else None,
                "point": trial.point,
                "values": dict(trial.values),
                "ending": trial.ending,
                "value": trial.value,
                "seconds": trial.seconds,
                "run": trial.run,
                "error": trial.error,
            }
            for trial in ranked(result)
        ],
    }


def write_summary(result: SweepResult) -> list[Path]:
    """``summary.csv`` and ``summary.png`` in the sweep's folder; the plots only where a trial has a value."""
    folder = result.sweep.folder
    columns, rows = summary(result)
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    written = [folder / "summary.csv"]
    if any(trial.value is not None for trial in result.trials):
        _plot(result, folder / "summary.png")
        written.append(folder / "summary.png")
    return written


def _plot(result: SweepResult, path: Path) -> None:
    """The metric over each key that varies in numbers, and the best so far over the trials."""
    with extra("sweep"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullFormatter

    keys = [key for key in varied_keys(result.sweep) if _numbers(result.trials, key)]
    figure = Figure(figsize=(_PANEL[0] * (len(keys) + 1), _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Sequence[Axes] = figure.subplots(1, len(keys) + 1, sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=False):
        for color, arm in enumerate(result.sweep.arms):
            points = [(float(trial.values[key]), trial.value) for trial in _of(result, arm.name) if key in trial.values]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), "o", ms=4, color=f"C{color}")
        if _is_log(result, key):
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(key)
    _plot_best_so_far(result, axes[-1])
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(result.sweep.metric)
    if len(result.sweep.arms) > 1:
        axes[-1].legend(fontsize="small")
    figure.suptitle(f"{result.sweep.name}, scale {result.sweep.scale}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _plot_best_so_far(result: SweepResult, axis: Axes) -> None:
    better = max if result.sweep.mode == "max" else min
    for color, arm in enumerate(result.sweep.arms):
        points = [(trial.point + 1, trial.value) for trial in _of(result, arm.name) if trial.value is not None]
        if points:
            numbers, values = zip(*points, strict=True)
            best = list(itertools.accumulate(values, better))
            axis.step(numbers, best, where="post", marker="o", ms=3, color=f"C{color}", label=arm.name)
    axis.set_xlabel("trials, best so far")


def _of(result: SweepResult, arm: str) -> list[Trial]:
    """The arm's trials that have a value, in the order of the points."""
    found = [trial for trial in result.trials if trial.arm == arm and trial.value is not None]
    return sorted(found, key=lambda trial: trial.point)


def _numbers(trials: Sequence[Trial], key: str) -> list[float]:
    """The values of a key, where all of them are numbers."""
    try:
        return [float(trial.values[key]) for trial in trials if key in trial.values]
    except ValueError:
        return []


def _is_log(result: SweepResult, key: str) -> bool:
    """Whether a key runs over orders of magnitude: as its range says, or by its values."""
    dimensions = [each for arm in result.sweep.arms for each in arm.dimensions if each.key == key]
    ranges = [each for each in dimensions if isinstance(each, Range)]
    if ranges:
        return any(each.log for each in ranges)
    values = _numbers(result.trials, key)
    return min(values) > 0 and math.log10(max(values) / min(values)) >= 1
