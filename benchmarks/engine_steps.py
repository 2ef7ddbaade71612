"""A callback that times an engine's optimizer steps against a bare loop of the same work, in turn in one process.

Apart from ``engines.py``, so that a recipe can name it: ``engine_steps:InTurn``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from timing import ACCEPTED_WAIT, Timing, seconds_in_run_queue, wait_for_quiet

from lbzoo.data.loader import train_loader
from lbzoo.recipe import ResolvedRecipe, build_data, build_schedule, build_task, optimizer_factory

WARMUP = 4  # steps


@dataclass
class Measurement:
    """What is measured, and what came out."""

    recipe: ResolvedRecipe
    cpu_time: bool = False
    time_limit: float = 120.0
    engine: Timing = field(default_factory=Timing)
    bare: Timing = field(default_factory=Timing)

    def clock(self) -> float:
        return time.process_time() if self.cpu_time else time.perf_counter()


current: Measurement | None = None  # of the run that is going on


class InTurn(Callback):
    """After each of the engine's steps the bare loop makes one. The engine's lasts until this hook is called again."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        assert current is not None
        self._measurement = current
        self._bare_step = bare_loop(current.recipe)
        self._deadline = time.perf_counter() + current.time_limit
        self._done = 0
        self._begin: tuple[float, float] | None = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        measurement = self._measurement
        self._done += 1
        if self._begin is not None and self._done > WARMUP:
            _keep(measurement, measurement.engine, self._begin)
        begin = self._wait()
        next(self._bare_step)
        if self._done > WARMUP:
            _keep(measurement, measurement.bare, begin)
        if time.perf_counter() > self._deadline:
            trainer.should_stop = True
        self._begin = self._wait()

    def _wait(self) -> tuple[float, float]:
        """(time spent waiting for a core, clock), once the machine is idle."""
        if not self._measurement.cpu_time:
            wait_for_quiet(self._deadline)
        return seconds_in_run_queue(), self._measurement.clock()


def _keep(measurement: Measurement, timing: Timing, begin: tuple[float, float]) -> None:
    seconds, waited = measurement.clock() - begin[1], seconds_in_run_queue() - begin[0]
    if waited > ACCEPTED_WAIT * seconds and not measurement.cpu_time:
        timing.discarded += 1
    else:
        timing.seconds.append(seconds)


def bare_loop(recipe: ResolvedRecipe) -> Iterator[None]:
    """The recipe's task, data, optimizer and schedule in a loop of torch alone; one optimizer step a ``next``."""
    (stage,) = recipe.stages
    torch.manual_seed(recipe.seed)
    task = build_task(stage)
    optimizer = optimizer_factory(stage)(task)
    multiplier: Callable[[int], float] = build_schedule(stage)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: multiplier(done + 1))
    accumulate = stage.global_batch_size // stage.micro_batch_size
    loader = train_loader(
        build_data(stage),
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        steps=stage.steps,
        seed=recipe.seed,
        num_workers=0,
    )
    for index, batch in enumerate(loader):
        loss = task.training_step(batch, index) / accumulate
        if index % accumulate == 0:
            optimizer.zero_grad()  # here, as in the engines: where memory is freed has its price as well
        loss.backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            schedule.step()
            yield
