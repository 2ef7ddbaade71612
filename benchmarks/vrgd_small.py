"""VRGD table 5 in small: ResNet-20 on digits, four optimizers, their VR forms, and two controls (docs/vrgd_small.md).

    python benchmarks/vrgd_small.py                    # everything that is missing, then the tables
    python benchmarks/vrgd_small.py --processes 2
    python benchmarks/vrgd_small.py --report           # the tables of what there is
    python benchmarks/vrgd_small.py --lengths          # how much of the gradient's length r leaves, printed

First each optimizer's learning rate is tuned at the smallest batch, without VR; then the cells are run, and the largest
batch at other learning rates. Every finished run is a line of the JSON-lines file beside the page, which is where a
second start goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timing import machine, result_file
from vrgd_small_cells import (
    BASE_BATCH,
    BATCHES,
    OPTIMIZERS,
    SEEDS,
    SWEEP_FACTORS,
    SWEEP_SEEDS,
    TUNING_SEED,
    VARIANTS,
    Cell,
    train,
)
from vrgd_small_tables import Results, report, tuned_lr, tuning_rows

from lbzoo.engines.run_folder import environment


def tuning_cells(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The tuning runs that are missing: base optimizers at the base batch, with a seed that is not used again.

    After the grid of each optimizer, one value beyond it for as long as the best one stands at an end.
    """
    cells = []
    for name, optimizer in OPTIMIZERS.items():
        tried = {row["base_lr"] for row in tuning_rows(name, rows)}
        missing = [lr for lr in optimizer.learning_rates if lr not in tried]
        if not missing:
            best = tuned_lr(name, rows)
            missing = [2 * best] if best == max(tried) else [best / 2] if best == min(tried) else []
        cells += [Cell(name, "base", BASE_BATCH, TUNING_SEED, lr) for lr in missing]
    return cells


def sweep_cells(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The largest batch at other learning rates than the scaled one, with and without VR; those that are missing."""
    tuned = {name: tuned_lr(name, rows) for name in OPTIMIZERS}
    cells = [
        Cell(name, variant, BATCHES[-1], seed, tuned[name], factor)
        for seed in SWEEP_SEEDS
        for name in OPTIMIZERS
        for variant in ("base", "vr")
        for factor in SWEEP_FACTORS
    ]
    done = [{key: row[key] for key in asdict(cells[0])} for row in rows]
    return [cell for cell in cells if asdict(cell) not in done]


def run_block(
    optimizer: str, global_batch_size: int, seed: int, base_lr: float, done: Mapping[str, Mapping[str, Any]], file: Path
) -> int:
    """The variants of one cell that are not done, one after the other; how many they were."""
    rows = dict(done)
    for variant in VARIANTS:
        if variant not in rows:
            factor = rows["vr"]["mean_r"] if variant == "lower_lr" else 1.0
            rows[variant] = run_cell(Cell(optimizer, variant, global_batch_size, seed, base_lr, factor), file)
    return len(rows) - len(done)


def run_cell(cell: Cell, file: Path) -> dict[str, Any]:
    """Train, and add the row to the file."""
    row = {**asdict(cell), **train(cell)[1], "commit": _commit()}
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")  # one write of less than a page: whole beside those of other processes
    return row


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def drop_unfinished_line(file: Path) -> None:
    """What a kill in the middle of writing has left."""
    if file.exists():
        text = file.read_text(encoding="utf-8")
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def run_all(file: Path, processes: int) -> None:
    """Tune, then train everything, seed by seed; what stands in the file is not run again."""
    drop_unfinished_line(file)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _one_thread) as pool:
        while cells := tuning_cells(read_rows(file)):
            _wait("tuning runs", [pool.submit(run_cell, cell, file) for cell in cells])

        # The smallest batch takes most of the time and has the least to say: last.
        _run_grid(BATCHES[1:], file, pool)
        cells = sweep_cells(read_rows(file))
        _wait("runs at other learning rates", [pool.submit(run_cell, cell, file) for cell in cells])
        _run_grid(BATCHES[:1], file, pool)


def _run_grid(sizes: Sequence[int], file: Path, pool: ProcessPoolExecutor) -> None:
    rows = read_rows(file)
    results, jobs = Results(rows), []
    for seed, size, name in itertools.product(SEEDS, reversed(sizes), OPTIMIZERS):
        done = results.finished(name, size, seed)
        if len(done) < len(VARIANTS):
            jobs.append(pool.submit(run_block, name, size, seed, tuned_lr(name, rows), done, file))
    _wait(f"cells of four runs at batches {sizes}", jobs)


def print_lengths(rows: Sequence[Mapping[str, Any]]) -> None:
    """Of the first seed at the largest batch, with true and permuted GSNR."""
    _one_thread()
    for name, variant in itertools.product(OPTIMIZERS, ("vr", "permuted")):
        _, measured = train(Cell(name, variant, BATCHES[-1], SEEDS[0], tuned_lr(name, rows)))
        kept, mean = measured["kept_length"], measured["mean_r"]
        print(f"{name} {variant}: |r g| / |g| = {kept:.2f}, mean r = {mean:.2f}", flush=True)


@functools.cache
def _commit() -> str | None:
    commit: str | None = environment()["commit"]
    return commit


def _one_thread() -> None:
    torch.set_num_threads(1)


def _wait(what: str, jobs: Sequence[Any]) -> None:
    begin = time.monotonic()
    for finished, job in enumerate(as_completed(jobs), start=1):
        job.result()
        elapsed = time.monotonic() - begin
        left = elapsed / finished * (len(jobs) - finished)
        print(f"{finished} of {len(jobs)} {what}, {elapsed:.0f} s, about {left:.0f} s to go", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each (default 1)")
    parser.add_argument("--rows", type=Path, help="JSON-lines file of the runs (default: of today and this machine)")
    parser.add_argument("--report", action="store_true", help="no runs, only the tables")
    parser.add_argument("--lengths", action="store_true", help="print |r g| / |g| at the largest batch")
    chosen = parser.parse_args(arguments)
    page = result_file("vrgd_small", machine())
    rows_file = chosen.rows or page.with_suffix(".jsonl")
    rows_file.parent.mkdir(exist_ok=True)
    if chosen.lengths:
        print_lengths(read_rows(rows_file))
        return
    if not chosen.report:
        run_all(rows_file, chosen.processes)
    text = report(read_rows(rows_file), rows_file.name)
    page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
