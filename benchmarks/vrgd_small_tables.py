"""The tables of ``vrgd_small.py``, in Markdown, from its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from timing import machine
from vrgd_small_cells import (
    BASE_BATCH,
    BATCHES,
    GRADIENTS,
    OPTIMIZERS,
    SEEDS,
    SWEEP_FACTORS,
    SWEEP_SEEDS,
    TUNING_SEED,
    VARIANTS,
)

from lbzoo.engines.run_folder import environment
from lbzoo.papers import find_rows

# The paper's batch sizes that are as many times its smallest: 1, 4, 8, and 16 and 32 for our 22.
PAPER_BATCHES = {64: (256,), 256: (1024,), 512: (2048,), 1408: (4096, 8192)}
COMPARISONS = (("vr", "base"), ("vr", "lower_lr"), ("vr", "permuted"), ("lower_lr", "base"), ("permuted", "base"))


FEWEST = 3  # differences that make an interval


class Results:
    """The finished runs of the grid, by optimizer, batch size and variant, in the order of SEEDS."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows
        self._by_run = {
            (row["optimizer"], row["global_batch_size"], row["variant"], row["seed"]): row for row in grid_rows(rows)
        }

    def finished(self, optimizer: str, global_batch_size: int, seed: int) -> dict[str, Mapping[str, Any]]:
        """The runs of a cell by variant."""
        runs = {variant: self._by_run.get((optimizer, global_batch_size, variant, seed)) for variant in VARIANTS}
        return {variant: row for variant, row in runs.items() if row is not None}

    def values(self, key: str, optimizer: str, global_batch_size: int, variant: str) -> dict[int, float]:
        """What was measured, by seed. ``gap`` is train accuracy - test accuracy."""
        runs = {seed: self._by_run.get((optimizer, global_batch_size, variant, seed)) for seed in SEEDS}
        done = {seed: row for seed, row in runs.items() if row is not None}
        if key == "gap":
            return {seed: row["train_accuracy"] - row["test_accuracy"] for seed, row in done.items()}
        return {seed: row[key] for seed, row in done.items()}

    def differences(self, key: str, optimizer: str, global_batch_size: int, first: str, second: str) -> list[float]:
        """first - second, seed by seed, where both were run."""
        minuends = self.values(key, optimizer, global_batch_size, first)
        subtrahends = self.values(key, optimizer, global_batch_size, second)
        return [minuends[seed] - subtrahends[seed] for seed in SEEDS if seed in minuends and seed in subtrahends]


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, and half the width of its 95 % interval (Student's t); NaN for fewer than FEWEST."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Interval:
        from scipy.stats import t

        if len(differences) < FEWEST:
            return cls(float("nan"), float("nan"))
        quantile = float(t.ppf(0.975, len(differences) - 1))
        return cls(
            statistics.fmean(differences), quantile * statistics.stdev(differences) / math.sqrt(len(differences))
        )

    @property
    def excludes_zero(self) -> bool:
        # Accuracies on few images repeat exactly; no spread at all is not certainty.
        return abs(self.mean) > self.half_width > 0

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return ""
        mean = round(self.mean, 2) + 0.0  # no -0.00
        return f"{mean:+.2f} ± {self.half_width:.2f}{' *' if self.excludes_zero else ''}"


def report(rows: Sequence[Mapping[str, Any]], rows_file: str) -> str:
    """The page of results, in Markdown."""
    results = Results(rows)
    seconds = sum(row["cpu_seconds"] for row in rows)
    parts = [
        _head(rows, rows_file),
        f"{len(rows)} runs, {seconds / 60:.0f} minutes of one core. Accuracies in percent of the 360 held-out images "
        "(one image is 0.28), after the last step, in evaluation mode: mean ± standard deviation over the seeds. "
        "Differences are paired by seed: mean ± half of the 95 % interval (Student's t), starred where it excludes 0.",
        "## Accuracy",
        accuracy_table(results),
        "## Differences of accuracy, in percentage points",
        difference_table(results, "test_accuracy"),
        stars(results, "test_accuracy"),
        "## Generalisation gap: train accuracy - test accuracy, in percentage points",
        gap_table(results),
        "## Table 5 of the paper, at the same multiples of the smallest batch",
        "Cited, not measured: VRGD (arXiv 2309.13681), ResNet-56 on CIFAR-10, top-1, mean of 5.",
        paper_table(results),
        f"## Batch {BATCHES[-1]} at other learning rates: accuracy",
        f"Times the scaled learning rate; seeds {SWEEP_SEEDS[0]} to {SWEEP_SEEDS[-1]}.",
        sweep_table(rows),
        f"## Learning rates tried at batch {BASE_BATCH}, with their held-out losses (seed {TUNING_SEED})",
        tuning_table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def accuracy_table(results: Results) -> str:
    lines = []
    for name, size in _cells():
        steps = results.values("steps", name, size, "base").values()
        mean_r = list(results.values("mean_r", name, size, "vr").values())
        accuracies = [_mean_and_deviation(results.values("test_accuracy", name, size, each)) for each in VARIANTS]
        mean = f"{statistics.fmean(mean_r):.2f}" if mean_r else ""
        lines.append([name, size, next(iter(steps), ""), _seeds(results, name, size), *accuracies, mean])
    return _table(["optimizer", "batch", "steps", "n", *VARIANTS, "mean r"], lines)


def _seeds(results: Results, optimizer: str, global_batch_size: int) -> str:
    """How many seeds each variant was run with: one number where it is one."""
    counts = [len(results.values("test_accuracy", optimizer, global_batch_size, variant)) for variant in VARIANTS]
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))


def difference_table(results: Results, key: str) -> str:
    lines = [
        [name, size, *(Interval.of(results.differences(key, name, size, *pair)) for pair in COMPARISONS)]
        for name, size in _cells()
    ]
    return _table(["optimizer", "batch", *(f"{first} - {second}" for first, second in COMPARISONS)], lines)


def stars(results: Results, key: str) -> str:
    """How many stars there are, and how many chance would give."""
    intervals = [
        Interval.of(results.differences(key, name, size, *pair)) for name, size in _cells() for pair in COMPARISONS
    ]
    intervals = [interval for interval in intervals if not math.isnan(interval.half_width)]
    starred = sum(interval.excludes_zero for interval in intervals)
    return (
        f"{starred} of {len(intervals)} intervals exclude zero; where nothing differs, about "
        f"{round(0.05 * len(intervals))} would."
    )


def gap_table(results: Results) -> str:
    lines = []
    for name, size in _cells():
        train = [_mean_and_deviation(results.values("train_accuracy", name, size, each)) for each in ("base", "vr")]
        gaps = [_mean_and_deviation(results.values("gap", name, size, each)) for each in VARIANTS]
        lines.append([name, size, *train, *gaps, Interval.of(results.differences("gap", name, size, "vr", "base"))])
    columns = ["train, base", "train, vr", *(f"gap, {variant}" for variant in VARIANTS), "gap, vr - base"]
    return _table(["optimizer", "batch", *columns], lines)


def paper_table(results: Results) -> str:
    lines = []
    for name, size in _cells():
        for paper_size in PAPER_BATCHES[size]:
            cited = [_cited(optimizer, paper_size) for optimizer in (name, f"vr-{name}")]
            ours = Interval.of(results.differences("test_accuracy", name, size, "vr", "base"))
            lines.append(
                [name, paper_size, *(f"{top1:.2f}" for top1 in cited), f"{cited[1] - cited[0]:+.2f}", size, ours]
            )
    return _table(["optimizer", "paper: batch", "base", "VR", "VR - base", "here: batch", "vr - base, measured"], lines)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    factors = sorted([*SWEEP_FACTORS, 1.0])
    lines: list[list[object]] = []
    for name in OPTIMIZERS:
        base, vr = ([_swept(rows, name, variant, factor) for factor in factors] for variant in ("base", "vr"))
        differences = [
            Interval.of([ours[seed] - theirs[seed] for seed in SWEEP_SEEDS if seed in ours and seed in theirs])
            for ours, theirs in zip(vr, base, strict=True)
        ]
        lines.append([name, "base", *map(_mean_and_deviation, base)])
        lines.append([name, "vr", *map(_mean_and_deviation, vr)])
        lines.append([name, "vr - base", *differences])
    return _table(["optimizer", "variant", *(f"{factor:g}" for factor in factors)], lines)


def _swept(rows: Sequence[Mapping[str, Any]], optimizer: str, variant: str, factor: float) -> dict[int, float]:
    """Accuracy by seed at the largest batch, at ``factor`` times the scaled learning rate."""
    wanted = (optimizer, variant, BATCHES[-1], factor)
    return {
        row["seed"]: row["test_accuracy"]
        for row in rows
        if (row["optimizer"], row["variant"], row["global_batch_size"], row["lr_factor"]) == wanted
        and row["seed"] in SWEEP_SEEDS
        and row["base_lr"] == tuned_lr(optimizer, rows)
    }


def tuning_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name in OPTIMIZERS:
        losses = {row["base_lr"]: row["test_loss"] for row in tuning_rows(name, rows)}
        tried = [f"{lr:g}: {loss:.3f}" for lr, loss in sorted(losses.items())]
        lines.append([name, f"{tuned_lr(name, rows):g}" if losses else "", ", ".join(tried)])
    return _table(["optimizer", "chosen", "learning rate: loss"], lines)


def grid_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs of the grid: at the tuned learning rate, scaled, and not those of the tuning or the sweep."""
    tuned = {name: tuned_lr(name, rows) for name in OPTIMIZERS if tuning_rows(name, rows)}
    return [
        row
        for row in rows
        if row["seed"] in SEEDS
        and row["base_lr"] == tuned.get(row["optimizer"], row["base_lr"])
        and (row["lr_factor"] == 1.0 or row["variant"] == "lower_lr")
    ]


def tuned_lr(name: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of the lowest held-out loss: finer than an accuracy on 360 images."""
    return float(min(tuning_rows(name, rows), key=lambda row: row["test_loss"])["base_lr"])


def tuning_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tuning runs of an optimizer."""
    return [row for row in rows if (row["seed"], row["optimizer"]) == (TUNING_SEED, name)]


def _cells() -> list[tuple[str, int]]:
    return [(name, size) for name in OPTIMIZERS for size in BATCHES]


def _cited(optimizer: str, global_batch_size: int) -> float:
    (row,) = find_rows("vrgd/5", {"optimizer": optimizer, "batch_size": global_batch_size})
    return float(row["top1"])


def _mean_and_deviation(values: Mapping[int, float]) -> str:
    if len(values) < 2:
        return ""
    return f"{statistics.fmean(values.values()):.2f} ± {statistics.stdev(values.values()):.2f}"


def _table(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [columns, rule, *lines])


def _head(rows: Sequence[Mapping[str, Any]], rows_file: str) -> str:
    here = environment()
    commits = ", ".join(sorted({str(row.get("commit")) for row in rows}))
    return (
        f"# VRGD table 5 in small, on {machine()}\n\n"
        f"{date.today().isoformat()}, commit of the runs {commits}, Python {here['python']}, "
        f"torch {torch.__version__}, one thread a run; {len(SEEDS)} seeds, k = {GRADIENTS}. "
        f"What it means: docs/vrgd_small.md; every run: {rows_file}. Made by:\n\n    python benchmarks/vrgd_small.py"
    )
