"""What GradientStats costs: a training step with it against one without, and the bytes that it sends.

    python benchmarks/gsnr.py                                       # a BERT-base-sized step on the CPU
    python benchmarks/gsnr.py --device cuda --batch-size 32 --seq-len 128
    python benchmarks/gsnr.py --model tiny --threads 1 --dry-run

A step: ``--micro-batches`` forward and backward passes and an AdamW step. With statistics: the same with a
GradientStats on the model, and once more with the mean GSNR of every layer read in each step. The bytes are those of
the reductions of one step under DDP and FSDP2 on two processes (gloo, a small model: the ratio does not depend on the
size). See ``timing.py`` for how the times are taken; the result is a dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from timing import Timing, compare, device_name, save_result
from torch import Tensor, nn

from lbzoo.engines.run_folder import environment
from lbzoo.gsnr import GradientStats
from lbzoo.testing.processes import Processes

WITHOUT, WITH, READ = "without", "GradientStats", "GradientStats, GSNR of every layer read"


@dataclass(frozen=True)
class Size:
    """A BERT for masked words."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 30522


SIZES = {"bert-base": Size(768, 12, 12), "tiny": Size(64, 2, 2, 1000)}


def make_model(size: Size) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
    )
    torch.manual_seed(0)
    model: nn.Module = BertForMaskedLM(config)
    return model


class Contestant:
    """A model of its own and its training step."""

    def __init__(self, label: str, arguments: argparse.Namespace) -> None:
        size = SIZES[arguments.model]
        self.model = make_model(size).to(arguments.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.stats = GradientStats(self.model) if label != WITHOUT else None
        self.reads = label == READ
        shape = (arguments.batch_size, arguments.seq_len)
        generator = torch.Generator().manual_seed(1)
        self.micro_batches: list[Tensor] = [
            torch.randint(size.vocabulary, shape, generator=generator).to(arguments.device)
            for _ in range(arguments.micro_batches)
        ]

    def step(self) -> None:
        for words in self.micro_batches:
            (self.model(input_ids=words, labels=words).loss / len(self.micro_batches)).backward()
        if self.stats is not None:
            if self.reads:
                torch.stack(list(self.stats.mean_gsnr_per_layer().values())).cpu()
            self.stats.reset()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Timing], int]:
    """(the times, the number of parameters)."""
    contestants = {label: Contestant(label, arguments) for label in (WITHOUT, WITH, READ)}
    steps: dict[str, Callable[[], object]] = {label: contestant.step for label, contestant in contestants.items()}
    timings = compare(
        steps,
        samples=arguments.samples,
        warmup=1,
        time_limit=arguments.time_limit,
        synchronize=torch.cuda.synchronize if arguments.device == "cuda" else lambda: None,
        cpu_time=arguments.threads == 1,
    )
    return timings, sum(parameter.numel() for parameter in contestants[WITHOUT].model.parameters())


@dataclass(frozen=True)
class Traffic:
    """The reductions of one step on one rank."""

    collectives: int
    bytes: int


def count_traffic(layout: str, with_stats: bool) -> Traffic:
    """Runs on each of several ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256) for _ in range(8)]
    model: nn.Module = nn.Sequential(*layers)
    if layout == "DDP":
        model = DistributedDataParallel(model, bucket_cap_mb=1)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if with_stats:
        GradientStats(model)
    for _ in range(2):  # DDP builds its buckets anew after the first step
        model.zero_grad()
        with recorded() as reductions:
            model(torch.randn(4, 256)).square().mean().backward()
    return Traffic(len(reductions), sum(reductions))


@contextmanager
def recorded() -> Iterator[list[int]]:
    """The bytes of every reduction that begins in the block."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    reductions: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and "reduce" in func._opname:
                sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
                reductions.append(max(sizes))
            return func(*args, **(kwargs or {}))

    with Record():
        yield reductions


def report(timings: dict[str, Timing], parameters: int, arguments: argparse.Namespace) -> Iterator[str]:
    here = environment()
    device = device_name(arguments.device)
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "lbzoo") if name in here["packages"])
    yield f"# GradientStats on {device}"
    yield ""
    yield f"{date.today().isoformat()}, commit {here['commit']}, Python {here['python']}, {versions};"
    yield f"{torch.get_num_threads()} threads. Made by:"
    yield ""
    yield f"    python benchmarks/gsnr.py {' '.join(sys.argv[1:])}".rstrip()
    yield ""
    yield f"One step: {arguments.model} ({parameters / 1e6:.1f}M parameters, float32), {arguments.micro_batches}"
    yield f"micro-batches of {arguments.batch_size} sequences of {arguments.seq_len}, torch's fused AdamW."
    yield f"`ms`: median {'processor time' if arguments.threads == 1 else 'wall time'}; `spread`: half the distance of"
    yield "the quartiles; `discarded`: samples that had to wait for a core."
    yield ""
    yield "| step | ms | x without | spread | n | discarded |"
    yield "|---|---:|---:|---:|---:|---:|"
    reference = timings[WITHOUT].median
    for label, timing in timings.items():
        yield (
            f"| {label} | {1e3 * timing.median:.1f} | {timing.median / reference:.3f} | {timing.spread:.1%} "
            f"| {len(timing.seconds)} | {timing.discarded} |"
        )
    yield ""
    yield "Reductions of one step on one of two ranks, eight layers of 256 x 256:"
    yield ""
    yield "| | collectives | bytes | with GradientStats: collectives | bytes | bytes x |"
    yield "|---|---:|---:|---:|---:|---:|"
    from gsnr import count_traffic  # by a name that the other processes can import

    with Processes(2) as processes:
        for layout in ("DDP", "FSDP2"):
            without, with_stats = (processes.run(2, count_traffic, layout, stats)[0] for stats in (False, True))
            yield (
                f"| {layout} | {without.collectives} | {without.bytes:,} | {with_stats.collectives} "
                f"| {with_stats.bytes:,} | {with_stats.bytes / without.bytes:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="bert-base")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of timing")
    parser.add_argument("--threads", type=int, help="default: one a core; 1: processor time, for busy machines")
    parser.add_argument("--dry-run", action="store_true", help="print, write no file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    timings, parameters = measure(arguments)
    missing = [label for label, timing in timings.items() if not timing.seconds]
    text = "\n".join(report(timings, parameters, arguments)) + "\n"
    print(text)
    if missing:
        sys.exit(f"no sample without waiting for a core in {time.monotonic() - began:.0f} s: {', '.join(missing)}")
    if not arguments.dry_run:
        save_result("gsnr", text, arguments.device)


if __name__ == "__main__":
    main()
