"""Runs with faults of the machine; importable by worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from fit_jobs import fit_here
from torch.distributed.checkpoint.filesystem import FileSystem

from lbzoo.engines.run_callbacks import MicroBatchSeeds


@contextmanager
def no_room_at(*steps: int) -> Iterator[None]:
    """The files of the checkpoints of these steps find no room on the disk."""
    original = FileSystem.create_stream

    @contextmanager
    def stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        if "w" in mode and Path(path).parent.name in [f"step_{step:08d}.tmp" for step in steps]:
            raise OSError(28, os.strerror(28))
        with original(self, path, mode) as file:
            yield file

    with patch.object(FileSystem, "create_stream", stream):
        yield


def fit_without_room_on_rank_1(recipe: Path, runs: Path) -> str:
    overrides = ["trainer.devices=2", "checkpoint={every_steps: 1, keep_last: 10, on_error: warn, asynchronous: true}"]
    with no_room_at(*([3] if dist.get_rank() == 1 else [])):
        fit_here(recipe, overrides, runs)
    return "finished"


def fit_with_a_slow_rank(recipe: Path, runs: Path) -> str:
    original = MicroBatchSeeds.on_train_batch_start

    def slow(self: Any, trainer: Any, *args: Any) -> None:
        if dist.get_rank() == 1 and trainer.global_step == 2:
            time.sleep(2)
        original(self, trainer, *args)

    with patch.object(MicroBatchSeeds, "on_train_batch_start", slow):
        return fit_here(recipe, ["trainer.devices=2"], runs).state.replace("running", "finished")
