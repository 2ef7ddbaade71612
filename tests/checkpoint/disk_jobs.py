"""Disks without room, and small models to save; importable by worker processes."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem

from lbzoo.checkpoint import CheckpointFolder, save_checkpoint
from lbzoo.errors import CheckpointError
from lbzoo.gsnr import GradientStats
from lbzoo.optim import create_optimizer

Trained = tuple[nn.Module, torch.optim.Optimizer]


@contextmanager
def full_after(operations: int) -> Iterator[Callable[[], bool]]:
    """Everything that takes room on the disk fails after so many operations: writes, flushes, folders, links, moves.

    Yields a function that says whether anything has failed.
    """
    left = [operations]
    failed = [False]

    def take() -> None:
        left[0] -= 1
        if left[0] < 0:
            failed[0] = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            take()
            return original(*args, **kwargs)

        return call

    original_stream = FileSystem.create_stream

    @contextmanager
    def stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with original_stream(self, path, mode) as file:
            yield _Counted(file, take) if "w" in mode else file

    with ExitStack() as stack:
        stack.enter_context(patch.object(FileSystem, "create_stream", stream))
        for name in ("write_text", "mkdir", "symlink_to", "rename"):
            stack.enter_context(patch.object(Path, name, counted(getattr(Path, name))))
        stack.enter_context(patch.object(os, "fsync", counted(os.fsync)))
        yield lambda: failed[0]


class _Counted:
    """A file that counts what is written to it."""

    def __init__(self, file: Any, take: Callable[[], None]) -> None:
        self._file, self._take = file, take

    def write(self, content: Any) -> Any:
        self._take()
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def remove(path: Path) -> None:
    shutil.rmtree(path)


def save_with_one_full_disk(folder: Path) -> str:
    """Three saves, the second without room on the last rank; what that raised on this one."""
    model, optimizer = trained("lamb")
    checkpoints = CheckpointFolder(folder)
    text = "nothing"
    for step in (1, 2, 3):
        is_full = step == 2 and dist.get_rank() == dist.get_world_size() - 1
        try:
            with full_after(0 if is_full else 10**9):
                save_checkpoint(checkpoints.step_path(step), model, optimizer, {"step": step})
        except CheckpointError as error:
            text = str(error)
    return text


def trained(optimizer: str, *, seed: int = 1) -> Trained:
    """A model with buffers, and its optimizer, after two steps."""
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    opt = create_optimizer(model, optimizer, lr=0.01)
    if hasattr(opt, "attach_stats"):
        opt.attach_stats(GradientStats(model))
    train(model, opt, steps=2)
    return model, opt


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            (model(torch.randn(8, 6)).square().mean() / 2).backward()
        optimizer.step()


def same(one: Trained, other: Trained) -> bool:
    """Weights, buffers and state, to the last bit."""
    values = [[*model.state_dict().values(), *_state(model, opt)] for model, opt in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
