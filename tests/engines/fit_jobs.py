"""``fit`` and ``validate`` on the ranks of a test; apart from the tests, so that worker processes can import them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lbzoo.checkpoint import load_weights, resolve_checkpoint
from lbzoo.engines import RunResult, fit, validate
from lbzoo.engines.run_callbacks import MicroBatchSeeds
from lbzoo.recipe import build_task, load_recipe
from lbzoo.recipe.schema import Scale

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def as_if_launched() -> Iterator[None]:
    """With the variables that torchrun would have set for this rank."""
    torch.set_num_threads(1)
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        os.environ.update(dict(zip(VARIABLES, map(str, (rank, size, rank, size)), strict=True)))
    try:
        yield
    finally:
        for name in VARIABLES:
            os.environ.pop(name, None)


def fit_here(recipe: str | Path, overrides: list[str], runs: Path, scale: Scale = "paper", **options: Any) -> RunResult:
    """``fit`` on the ranks of the process group that is there; in this process where there is none."""
    with as_if_launched():
        return fit(recipe, overrides, scale=scale, runs=runs, **options)


def fit_until_signal(recipe: Path, overrides: list[str], runs: Path, step: int) -> RunResult:
    """``fit_here`` in which the last rank alone gets a SIGTERM during the given optimizer step."""
    original = MicroBatchSeeds.on_train_batch_start

    def hook(callback: Any, trainer: Any, *rest: Any) -> None:
        original(callback, trainer, *rest)
        if trainer.global_step == step - 1 and trainer.global_rank == trainer.world_size - 1:
            if not stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            stopped.append(True)

    stopped: list[bool] = []
    MicroBatchSeeds.on_train_batch_start = hook  # type: ignore[method-assign]
    try:
        return fit_here(recipe, overrides, runs)
    finally:
        MicroBatchSeeds.on_train_batch_start = original  # type: ignore[method-assign]


def validate_here(run: Path, overrides: list[str]) -> dict[str, float]:
    with as_if_launched():
        return validate(run, overrides, prefer="last")


def saved_weights(run: Path) -> dict[str, Tensor]:
    """The parameters of a run's last checkpoint, in the type they were trained in, in one process."""
    recipe = load_recipe(run / "recipe.yaml")
    task = build_task(recipe.stages[-1])
    if recipe.trainer.precision == "64-true":
        task.double()
    load_weights(resolve_checkpoint(run), task)
    return {name: parameter.detach().clone() for name, parameter in task.named_parameters()}


def resume_and_listen(recipe: Path, runs: Path) -> list[str]:
    """What a resumed run says on this rank."""
    said: list[str] = []
    fit_here(recipe, ["trainer.devices=auto"], runs, resume="auto", say=said.append)
    return said
