"""What the engines add to an optimizer step, against a bare PyTorch loop of the same work.

    python benchmarks/engines.py
    python benchmarks/engines.py --cpu-time --steps 30 --dry-run

ResNet-50 in its real size, on small images and micro-batches so that a CPU manages a step in a second, and LeNet, whose
step takes a millisecond, so that everything around it shows. Both are whole runs of a recipe by ``lbzoo fit``, with
the callbacks, logs and checks of every run. After each of its steps a bare loop makes one on a model of its own: the
same task, data, optimizer and schedule, but no engine, no callback and no log. So both meet the machine as it is in the
same second. Steps at which something is logged are in the mean, and not in the median.

Steps during which this process waited for a core do not count; where the machine is never idle, ``--cpu-time`` counts
the processor's time of one thread. The result is a dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import engine_steps
import torch
from engine_steps import Measurement
from timing import Timing, machine, save_result

from lbzoo.engines import fit
from lbzoo.engines.run_folder import environment
from lbzoo.recipe import load_recipe

RECIPE = """\
version: 1
task: {{name: image_classification, model: {model}}}
data: {{name: synthetic_images, image_size: {image_size}, channels: {channels}, num_classes: {num_classes},
       num_train: 1000000, num_val: 1, global_batch_size: {global_batch}, micro_batch_size: {micro_batch}}}
optimizer: {{name: lamb, lr: 0.001}}
schedule: cosine
steps: {steps}
trainer: {{accelerator: cpu, devices: 1, num_workers: 0, validate_every: {{steps: 1000000}}}}
checkpoint: {{save_best: false}}
callbacks: ["engine_steps:InTurn"]
"""
SIZES = {
    "resnet50": {"model": "resnet50", "image_size": 64, "channels": 3, "num_classes": 1000, "global_batch": 16,
                 "micro_batch": 8},
    "lenet": {"model": "lenet", "image_size": 28, "channels": 1, "num_classes": 10, "global_batch": 16,
              "micro_batch": 16},
}  # fmt: skip
ENGINES = ("lightning", "accelerate")


def measure(size: str, engine: str, steps: int, *, cpu_time: bool, time_limit: float) -> Measurement:
    """Time ``steps`` steps of a run, after some that do not count."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, f"{size}.yaml")
        recipe.write_text(RECIPE.format(steps=steps + engine_steps.WARMUP, **SIZES[size]))
        overrides = [f"trainer.engine={engine}"]
        measurement = Measurement(load_recipe(recipe, overrides), cpu_time=cpu_time, time_limit=time_limit)
        engine_steps.current = measurement
        with contextlib.redirect_stdout(io.StringIO()):  # the run's own lines
            fit(recipe, overrides, runs=folder)
    return measurement


def report(rows: dict[tuple[str, str], Measurement], arguments: argparse.Namespace) -> str:
    here = environment()
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "lightning", "accelerate", "lbzoo"))
    sizes = "; ".join(
        f"{name}: {size['image_size']}x{size['image_size']} pixels, micro-batch {size['micro_batch']}, "
        f"{size['global_batch'] // size['micro_batch']} a step"
        for name, size in SIZES.items()
    )
    lines = [
        f"# Steps of the engines on {machine()}",
        "",
        f"{date.today().isoformat()}, commit {here['commit']}, Python {here['python']}, {versions};",
        f"{torch.get_num_threads()} threads, {'processor time' if arguments.cpu_time else 'the clock'}. Made by:",
        "",
        f"    python benchmarks/engines.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"{sizes[0].upper()}{sizes[1:]}; LAMB.",
        "`bare`, `engine`: median milliseconds a step of the loop in plain torch, and of the engine, in turn.",
        "`ratio`, `added`: of the medians. `mean`: milliseconds added to the mean step, logged steps included.",
        "`spread`: half the distance of the quartiles of the engine's. `n`: steps of the engine.",
        "",
        "| model | engine | bare | engine | ratio | added | mean | spread | n |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (size, engine), measurement in rows.items():
        bare, ours = measurement.bare, measurement.engine
        row = (size, engine, f"{1e3 * bare.median:.2f}", f"{1e3 * ours.median:.2f}",
               f"{ours.median / bare.median:.3f}", f"{1e3 * (ours.median - bare.median):.2f}",
               f"{1e3 * (_mean(ours) - _mean(bare)):.2f}", f"{1e3 * ours.spread * ours.median:.2f}",
               str(len(ours.seconds)))  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _mean(timing: Timing) -> float:
    return statistics.fmean(timing.seconds) if timing.seconds else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="one of them; both by default")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="one of them; both by default")
    parser.add_argument("--steps", type=int, help="of each run: 30 for resnet50, 600 for lenet by default")
    parser.add_argument("--time-limit", type=float, default=180.0, help="seconds of each run")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, for a busy machine")
    parser.add_argument("--dry-run", action="store_true", help="print, write no file")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    rows = {}
    for size in arguments.size or SIZES:
        steps = arguments.steps or {"resnet50": 30, "lenet": 600}[size]
        for engine in arguments.engine or ENGINES:
            rows[size, engine] = measure(
                size, engine, steps, cpu_time=arguments.cpu_time, time_limit=arguments.time_limit
            )
    text = report(rows, arguments)
    print(text)
    if not arguments.dry_run:
        save_result("engines_cpu_time" if arguments.cpu_time else "engines", text)


if __name__ == "__main__":
    main()
