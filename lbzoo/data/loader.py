"""From a data source to the micro-batches of one rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lbzoo.data.base import DataSource, Samples
from lbzoo.data.sampling import EvalSampler, StreamSampler
from lbzoo.errors import DataError


class Loader(DataLoader[Any]):
    """torch's DataLoader, in which the DataError of a loader process arrives as it was raised, and at once.

    torch puts that process's traceback into the message, and leaves the other processes to the garbage collector, which
    then waits five seconds for each.

    Who is done with one has to :meth:`close` it: its processes ignore SIGTERM, by which a main process that ends would
    end them, and would then wait for them for ever.
    """

    def close(self) -> None:
        """End the loader's processes; it may be used again."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]  # only one with processes is kept
            self._iterator = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch wants an iterator class of its own
        batches = super().__iter__()
        try:
            yield from batches
        except DataError as error:
            if self.num_workers > 0:
                self.close()
            kind = type(error)
            message = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2]
            raise kind(message.rstrip()) from None


def train_loader(
    source: DataSource,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    steps: int,
    start_step: int = 0,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | Literal["auto"] = "auto",
    pin_memory: bool = False,
) -> Loader:
    """This rank's micro-batches of the optimizer steps ``start_step`` to ``steps``, counted from 0."""
    samples = source.train_dataset(seed=seed)
    _share_faults(samples, world_size)
    sampler = StreamSampler(
        num_samples=len(samples),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        seed=seed,
        steps=steps,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
        preshuffled=source.preshuffled,
    )
    return _loader(source, samples, sampler, num_workers, pin_memory)


def val_loader(
    source: DataSource,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | Literal["auto"] = "auto",
    pin_memory: bool = False,
) -> Loader:
    """This rank's part of the validation set; all ranks together see every sample once, in as many batches each."""
    samples = source.val_dataset()
    _share_faults(samples, world_size)
    sampler = EvalSampler(num_samples=len(samples), micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
    return _loader(source, samples, sampler, num_workers, pin_memory)


def _share_faults(samples: Samples, world_size: int) -> None:
    """Tell files that may be unreadable how many ranks look for them, each among its own."""
    for unreadable in getattr(samples, "faults", ()):
        unreadable.ranks = world_size


def default_workers(source: DataSource) -> int:
    """Loader processes for ``auto``: this rank's share of the machine's cores, none for data in memory."""
    if source.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 16)


def _leave_signals_to_the_run(_worker: int) -> None:
    """A Ctrl-C or SIGTERM reaches the whole process group, and the run needs its loaders until it has saved."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(signum, signal.SIG_IGN)


def _loader(
    source: DataSource,
    samples: Samples,
    sampler: Sampler[Any],
    num_workers: int | Literal["auto"],
    pin_memory: bool,
) -> Loader:
    workers = default_workers(source) if num_workers == "auto" else num_workers
    return Loader(
        cast("Dataset[Any]", samples),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=source.collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_run,
        # The loader draws its workers' seed from this; torch's global generator is the model's.
        generator=torch.Generator(),
    )
