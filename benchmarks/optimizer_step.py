"""How long an optimizer step takes, against torch's fused AdamW in the same run.

    python benchmarks/optimizer_step.py                                     # ResNet-50 and BERT-base shapes, CPU
    python benchmarks/optimizer_step.py --models bert-large --device cuda
    python benchmarks/optimizer_step.py --optimizers 'lamb' 'timm Lamb*' --samples 15 --dry-run

Only ``step()`` is timed, on parameters with the shapes of real models and random gradients, in float32, one parameter
group, weight decay 0.01. See ``timing.py`` for how; the result is a dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from timing import Timing, compare, device_name, save_result
from torch import Tensor, nn

from lbzoo.engines.run_folder import environment
from lbzoo.errors import LbzooError
from lbzoo.optim import create_optimizer

Shapes = list[tuple[int, ...]]
MIB = 2**20


@dataclass(frozen=True)
class Contestant:
    """An optimizer by a name that ``create_optimizer`` knows."""

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


REFERENCE = "torch AdamW fused"
CONTESTANTS = (
    Contestant(REFERENCE, "torch:AdamW", {"fused": True}),
    Contestant("torch AdamW", "torch:AdamW"),
    Contestant("torch AdamW foreach", "torch:AdamW", {"foreach": True}),
    Contestant("lamb", "lamb"),
    Contestant("nlamb", "nlamb"),
    Contestant("timm Lamb without clipping", "timm:lamb", {"max_grad_norm": None}),
    Contestant("timm Lamb", "timm:lamb"),
    Contestant("pytorch_optimizer Lamb", "pytorch_optimizer:Lamb"),
    Contestant("novograd", "novograd"),
    Contestant("timm NvNovoGrad", "timm:novograd"),
    Contestant("lars", "lars"),
    Contestant("timm Lars", "timm:lars", {"momentum": 0.9}),
    Contestant("lans", "lans"),
    Contestant("lans compiled", "lans", {"compile": True}),
)
# PERFORMANCE: contestant, measured against, "must" and "aim" as a ratio of the times.
TARGETS = (
    ("lamb", REFERENCE, 2.0, 1.6),
    ("lamb", "timm Lamb without clipping", 1 / 3, 1 / 4.5),
    ("novograd", REFERENCE, 1.1, 0.9),
    ("lars", REFERENCE, 1.2, 1.0),
    ("lans", REFERENCE, 4.6, 3.5),
    ("lans compiled", REFERENCE, 3.0, 2.5),
)


def _resnet50() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("resnet50")
    return model


def _bert(**size: int) -> nn.Module:
    from transformers import BertConfig, BertForPreTraining

    return BertForPreTraining(BertConfig(**size))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": _resnet50,
    "bert-base": _bert,
    "bert-large": lambda: _bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "tiny": lambda: nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128)),
}


def shapes_of(model: str) -> Shapes:
    """The shapes of a model's parameters, tied ones once."""
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in MODELS[model]().parameters()]


@dataclass
class Row:
    """One contestant's result for one model. ``state``: floats of state per parameter."""

    label: str
    timing: Timing
    ratio: float
    state: float = math.nan
    extra_mib: float = math.nan
    note: str = ""

    def gigabytes_per_second(self, parameters: int) -> float:
        """Of the least a step moves: gradients read, parameters and state read and written."""
        return 4 * parameters * (3 + 2 * self.state) / self.timing.median / 1e9


@dataclass
class Report:
    """All rows of one model. ``bandwidth``: bytes a second of c = a + b in the same run."""

    model: str
    parameters: int
    tensors: int
    largest_mib: float
    bandwidth: float
    rows: list[Row]


def make_parameters(shapes: Shapes, device: str) -> list[nn.Parameter]:
    """Random weights with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = nn.Parameter(0.02 * torch.randn(shape, generator=generator, device=device))
        parameter.grad = 1e-3 * torch.randn(shape, generator=generator, device=device)
        parameters.append(parameter)
    return parameters


def build_step(contestant: Contestant, parameters: list[nn.Parameter]) -> tuple[Callable[[], object], float]:
    """(the step, its state in floats per parameter); the first steps have been taken. Raises what building raises."""
    optimizer = create_optimizer(parameters, contestant.name, lr=1e-4, weight_decay=0.01, **contestant.options)
    step: Callable[[], object] = optimizer.step
    threads = torch.get_num_threads()
    if not contestant.options.get("compile"):  # the compiler makes a kernel for as many threads as there are now
        torch.set_num_threads(1)  # two would wait for each other where others work as well, and nothing is timed yet
    for _ in range(2):
        step()
    torch.set_num_threads(threads)
    floats = sum(
        value.numel() for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return step, round(floats / sum(parameter.numel() for parameter in parameters), 2)


def measure(model: str, contestants: Sequence[Contestant], arguments: argparse.Namespace) -> Report:
    """Time the contestants on one model, in as many parts as memory asks for, each with the reference in it."""
    shapes = shapes_of(model)
    count = sum(math.prod(shape) for shape in shapes)
    parameters = make_parameters(shapes, arguments.device)
    rows: list[Row] = []
    bandwidths: list[float] = []
    reference, others = contestants[0], list(contestants[1:])
    size = max(1, int(free_bytes(arguments.device) * 0.4 / (8 * count)) - 1)
    for start in range(0, max(len(others), 1), size):
        part = [reference, *others[start : start + size]]
        limit = arguments.time_limit * len(part) / len(contestants)
        measured, bandwidth = measure_part(part, parameters, limit, arguments)
        rows = _with_part(rows, measured)
        bandwidths += [bandwidth] if bandwidth > 0 else []
    for row in rows:
        if not (row.note or arguments.no_memory or row.label.endswith("compiled")):  # a compiler's memory is its own
            row.extra_mib = extra_memory(model, row.label, arguments.device)
    largest = max(math.prod(shape) for shape in shapes) * 4 / MIB
    bandwidth = statistics.mean(bandwidths) if bandwidths else math.nan
    return Report(model, count, len(shapes), largest, bandwidth, rows)


def measure_part(
    part: Sequence[Contestant], parameters: list[nn.Parameter], limit: float, arguments: argparse.Namespace
) -> tuple[list[Row], float]:
    """(a row each, bytes a second of the memory), against the first of them."""
    steps: dict[str, Callable[[], object]] = {}
    states: dict[str, float] = {}
    failed: list[Row] = []
    for contestant in part:
        try:
            steps[contestant.label], states[contestant.label] = build_step(contestant, parameters)
        except (LbzooError, RuntimeError, ImportError) as error:
            failed.append(Row(contestant.label, Timing(), math.nan, note=str(error).splitlines()[0]))
    copied, copy = memory_stream(arguments.device)
    timings = compare(
        {**steps, "memory": copy},
        samples=arguments.samples,
        warmup=0,
        time_limit=limit,
        synchronize=torch.cuda.synchronize if arguments.device == "cuda" else (lambda: None),
        cpu_time=arguments.threads == 1,
    )
    first = timings[part[0].label].median
    rows = [Row(label, timings[label], timings[label].median / first, states[label]) for label in steps]
    return rows + failed, copied / timings["memory"].median


def _with_part(rows: list[Row], part: list[Row]) -> list[Row]:
    """The rows of all parts so far: the reference, which is the first of each part, once, with the most samples."""
    if not rows:
        return part
    return [max(rows[0], part[0], key=lambda row: len(row.timing.seconds)), *rows[1:], *part[1:]]


def memory_stream(device: str, floats: int = 1 << 25) -> tuple[int, Callable[[], object]]:
    """(bytes it moves, c = a + b on arrays that no cache holds)."""
    a, b, c = (torch.ones(floats, device=device) for _ in range(3))
    return 3 * 4 * floats, lambda: torch.add(a, b, out=c)


def free_bytes(device: str) -> int:
    """Memory that may be used."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


# What a step needs beyond parameters, gradients and state


def extra_memory(model: str, label: str, device: str) -> float:
    """MiB, measured in a process of its own; NaN where that fails."""
    command = [sys.executable, __file__, "--measure-memory", model, label, "--device", device]
    # Otherwise the C library keeps freed blocks of up to 32 MiB, and what a step took cannot be told from what it left.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    return float(json.loads(done.stdout)) if done.returncode == 0 else math.nan


def measure_memory(model: str, label: str, device: str) -> float:
    """The peak of a step over parameters, gradients and state, in MiB. Scratch that is kept between steps counts."""
    contestant = next(contestant for contestant in CONTESTANTS if contestant.label == label)
    build_step(contestant, make_parameters([(64, 64)], device))  # code and thread pools are not the step's memory
    parameters = make_parameters(shapes_of(model), device)
    before = memory_now(device)
    step, state = build_step(contestant, parameters)
    reset_peak(device)
    step()
    state_bytes = state * 4 * sum(parameter.numel() for parameter in parameters)
    return (memory_peak(device) - before - state_bytes) / MIB


def memory_now(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def memory_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


# The report


def markdown(reports: Sequence[Report], arguments: argparse.Namespace, seconds: float) -> str:
    """The result file."""
    return "\n".join([*_heading(arguments, seconds), *(line for report in reports for line in _model(report))])


def _heading(arguments: argparse.Namespace, seconds: float) -> Iterator[str]:
    here = environment()
    device = device_name(arguments.device)
    packages = ("torch", "timm", "pytorch_optimizer", "lbzoo")
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in packages if name in here["packages"])
    missing = [model for model in ("resnet50", "bert-base", "bert-large") if model not in arguments.models]
    other = "CUDA" if arguments.device == "cpu" else "CPU"
    yield f"# Optimizer steps on {device}"
    yield ""
    yield f"{date.today().isoformat()}, commit {here['commit']}, Python {here['python']}, {versions}; float32,"
    yield f"{torch.get_num_threads()} threads, {arguments.samples} samples, {seconds / 60:.0f} minutes. Made by:"
    yield ""
    yield f"    python benchmarks/optimizer_step.py {' '.join(arguments.typed)}".rstrip()
    yield ""
    clock = "processor time" if arguments.threads == 1 else "samples begun when the cores were idle"
    yield f"`ms`: median of `step()`, {clock}. `spread`: half the distance of the quartiles. `discarded`: samples that"
    yield "had to wait for a core. `GB/s`: gradients read, parameters and state read and written, once each."
    yield "`extra`: peak of a step beyond parameters, gradients and state, kept scratch included."
    yield f"Where memory does not hold all optimizers they are timed in parts: `x` is against {REFERENCE} in the same."
    yield f"Not measured here: {', '.join([*missing, other])}."


def _model(report: Report) -> Iterator[str]:
    floor = 28 * report.parameters / report.bandwidth
    yield ""
    yield f"## {report.model}: {report.parameters / 1e6:.1f}M parameters in {report.tensors} tensors"
    yield ""
    yield f"Memory in the same run: {report.bandwidth / 1e9:.1f} GB/s (c = a + b), so that AdamW's 28 bytes a parameter"
    yield f"take {1e3 * floor:.1f} ms. The largest tensor has {report.largest_mib:.1f} MiB."
    yield ""
    yield f"| optimizer | ms | x {REFERENCE} | spread | discarded | GB/s | state | extra MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in report.rows:
        if row.note or not row.timing.seconds:
            note = row.note or f"no sample without waiting for a core ({row.timing.discarded} discarded)"
            yield f"| {row.label} | {note} | | | | | | |"
            continue
        extra = "" if math.isnan(row.extra_mib) else f"{row.extra_mib:.1f}"
        yield (
            f"| {row.label} | {1e3 * row.timing.median:.1f} | {row.ratio:.2f} | {row.timing.spread:.0%} "
            f"| {row.timing.discarded} of {row.timing.discarded + len(row.timing.seconds)} "
            f"| {row.gigabytes_per_second(report.parameters):.1f} | {row.state:g} | {extra} |"
        )
    yield from _targets(report)


def _targets(report: Report) -> Iterator[str]:
    ratios = {row.label: row.ratio for row in report.rows if row.timing.seconds}
    targets = [target for target in TARGETS if target[0] in ratios and target[1] in ratios]
    if targets:
        yield ""
        yield "| target | measured | must | aim | |"
        yield "|---|---|---|---|---|"
    for label, against, must, aim in targets:
        ratio = ratios[label] / ratios[against]
        verdict = "aim reached" if ratio <= aim else "must reached" if ratio <= must else "missed"
        yield f"| {label} / {against} | {ratio:.2f} | {must:.2f} | {aim:.2f} | {verdict} |"


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["resnet50", "bert-base"])
    parser.add_argument("--optimizers", nargs="+", metavar="GLOB", default=["*"], help="by the names of the table")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of timing a model")
    parser.add_argument("--threads", type=int, help="default: one a core; 1: processor time, for busy machines")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, a process each")
    parser.add_argument("--dry-run", action="store_true", help="print the result instead of writing the file")
    parser.add_argument("--measure-memory", nargs=2, metavar=("MODEL", "OPTIMIZER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.typed = words
    return arguments


def main(words: Sequence[str]) -> None:
    """Measure, and write the result file."""
    arguments = parse(words)
    if arguments.measure_memory:
        print(json.dumps(measure_memory(*arguments.measure_memory, arguments.device)))
        return
    began = time.monotonic()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = [
        contestant
        for contestant in CONTESTANTS
        if contestant.label == REFERENCE or any(fnmatch.fnmatch(contestant.label, g) for g in arguments.optimizers)
    ]
    reports = []
    for model in arguments.models:
        reports.append(measure(model, chosen, arguments))
        print("\n".join(_model(reports[-1])), flush=True)
    text = markdown(reports, arguments, time.monotonic() - began)
    if arguments.dry_run:
        return
    print()
    benchmark = "optimizer_step_1_thread" if arguments.threads == 1 else "optimizer_step"
    save_result(benchmark, text + "\n", arguments.device)


if __name__ == "__main__":
    main(sys.argv[1:])
