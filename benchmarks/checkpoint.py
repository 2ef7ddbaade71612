"""What saving costs a training, and how long a resume takes.

    python benchmarks/checkpoint.py                                   # BERT-base and LAMB on the CPU
    python benchmarks/checkpoint.py --device cuda --batch-size 32 --micro-batches 8
    python benchmarks/checkpoint.py --model tiny --dry-run

A step: ``--micro-batches`` forward and backward passes and a step of the optimizer. *Blocked* is the time for which
the training's thread stands still for a save: all of it where it waits for the files; in the background, the time to
begin, and what the copy to the host still lacks before the next optimizer step. The steps during which files are
written share cores and memory with that: their times stand beside. A resume makes a model and an optimizer, and loads
a checkpoint whose files the system has been told to forget (POSIX_FADV_DONTNEED). Dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from gsnr import SIZES, make_model
from timing import device_name, save_result
from torch import Tensor, nn
from torch.optim import Optimizer

from lbzoo.checkpoint import BackgroundSaver, content_of, load_checkpoint, write
from lbzoo.engines.run_folder import environment
from lbzoo.optim import create_optimizer

MOST_BLOCKED = 0.10  # of a step
LONGEST_RESUME = 10.0  # seconds, on two cores


@dataclass
class Samples:
    """Seconds."""

    step: list[float] = field(default_factory=list)
    saved_at_once: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    step_while_writing: list[float] = field(default_factory=list)
    in_background: list[float] = field(default_factory=list)
    resume: list[float] = field(default_factory=list)


class Training:
    """A model in training, and the time for which it stands still."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.arguments = arguments
        self.model, self.optimizer = self.fresh()
        generator = torch.Generator().manual_seed(1)
        shape = (arguments.batch_size, arguments.seq_len)
        vocabulary = SIZES[arguments.model].vocabulary
        self.micro_batches: list[Tensor] = [
            torch.randint(vocabulary, shape, generator=generator).to(self.device)
            for _ in range(arguments.micro_batches)
        ]

    def fresh(self) -> tuple[nn.Module, Optimizer]:
        model = make_model(SIZES[self.arguments.model]).to(self.device)
        return model, create_optimizer(model, self.arguments.optimizer, lr=1e-4)

    def step(self, before_optimizer: Callable[[], None] = lambda: None) -> None:
        for words in self.micro_batches:
            loss: Tensor = self.model(input_ids=words, labels=words).loss
            (loss / len(self.micro_batches)).backward()
        before_optimizer()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, function: Callable[[], object]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(training: Training, folder: Path, samples: int) -> tuple[Samples, int]:
    """(the times, the bytes of a checkpoint)."""
    found = Samples()
    training.step()  # the optimizer's state, and everything's warm-up
    saver = BackgroundSaver()
    _save_in_background(training, saver, folder / "step_00000000", Samples())  # its copies get their memory
    for index in range(1, samples + 1):
        path = folder / f"step_{index:08d}"
        found.step.append(training.timed(training.step))
        content = content_of(training.model, training.optimizer, {"step": index})
        found.saved_at_once.append(training.timed(lambda path=path, content=content: write(path, content)))
        _save_in_background(training, saver, folder / f"step_{1000 + index:08d}", found)
        _forget(path)
        found.resume.append(training.timed(lambda path=path: load_checkpoint(path, *training.fresh())))
    saver.close()
    return found, sum(file.stat().st_size for file in path.iterdir())


def _save_in_background(training: Training, saver: BackgroundSaver, path: Path, found: Samples) -> None:
    """One save, and steps until it is written."""
    done: list[float] = []
    begin = time.perf_counter()
    content = content_of(training.model, training.optimizer, {"step": 0})
    saver.save(path, training.model, content, lambda: done.append(time.perf_counter()))
    blocked = time.perf_counter() - begin

    def wait() -> None:
        nonlocal blocked
        began = time.perf_counter()
        saver.wait_until_copied()
        blocked += time.perf_counter() - began

    while not done:
        found.step_while_writing.append(training.timed(lambda: training.step(wait)))
    found.blocked.append(blocked)
    found.in_background.append(done[0] - begin)
    saver.wait()


def _forget(path: Path) -> None:
    """Have the system drop the files from its memory, so that they are read from the disk."""
    if hasattr(os, "posix_fadvise"):
        for file in path.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def report(found: Samples, size: int, training: Training) -> Iterator[str]:
    here, arguments = environment(), training.arguments
    device = device_name(arguments.device)
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "lbzoo") if name in here["packages"])
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    step = statistics.median(found.step)
    yield f"# Checkpoints on {device}"
    yield ""
    yield f"{date.today().isoformat()}, commit {here['commit']}, Python {here['python']}, {versions};"
    yield f"{torch.get_num_threads()} threads. Made by:"
    yield ""
    yield f"    python benchmarks/checkpoint.py {' '.join(sys.argv[1:])}".rstrip()
    yield ""
    yield f"{arguments.model} ({parameters / 1e6:.1f}M parameters, float32), {arguments.optimizer}, a checkpoint of"
    yield f"{size / 2**20:,.0f} MiB in one process. A step: {arguments.micro_batches} micro-batches of"
    yield f"{arguments.batch_size} sequences of {arguments.seq_len}. `spread`: half the distance of the quartiles."
    yield ""
    yield "| | seconds | spread | n | steps |"
    yield "|---|---:|---:|---:|---:|"
    rows = {
        "a step without saving": found.step,
        "blocked by a save that is waited for": found.saved_at_once,
        "blocked by a save in the background": found.blocked,
        "that save, until it is on the disk": found.in_background,
        "a step meanwhile": found.step_while_writing,
        "a resume, files not in memory": found.resume,
    }
    for label, seconds in rows.items():
        median = statistics.median(seconds)
        yield f"| {label} | {median:.3f} | {_spread(seconds):.1%} | {len(seconds)} | {median / step:.3f} |"
    blocked, resume = statistics.median(found.blocked) / step, statistics.median(found.resume)
    yield ""
    yield f"A save in the background blocks {blocked:.1%} of a step (to be at most {MOST_BLOCKED:.0%}); a resume takes"
    yield f"{resume:.1f} s (to be below {LONGEST_RESUME:.0f} s on two cores)."


def _spread(seconds: list[float]) -> float:
    if len(seconds) < 3:
        return float("nan")
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="bert-base")
    parser.add_argument("--optimizer", default="lamb")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a place on the disk that is to be measured")
    parser.add_argument("--dry-run", action="store_true", help="print, write no file")
    arguments = parser.parse_args()
    training = Training(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found, size = measure(training, Path(folder), arguments.samples)
    text = "\n".join(report(found, size, training)) + "\n"
    print(text)
    if not arguments.dry_run:
        save_result("checkpoint", text, arguments.device)


if __name__ == "__main__":
    main()
