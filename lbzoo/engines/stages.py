"""The stages of a run, one after the other, on the engine that the recipe names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from lbzoo.checkpoint import load_weights, names_in_common, read_state, shapes, validates_averages
from lbzoo.data.base import DataSource
from lbzoo.engines import distributed
from lbzoo.engines.activation_checkpointing import checkpoint_activations
from lbzoo.engines.checkpointer import Best
from lbzoo.engines.divergence import Rollbacks, scaled
from lbzoo.engines.launch import World
from lbzoo.engines.opening import resume_point
from lbzoo.engines.run_folder import RunFolder
from lbzoo.engines.signals import StopSignals
from lbzoo.engines.stage_run import Outcome, StageRun, Start, validation_loader
from lbzoo.errors import CheckpointError, DivergedError
from lbzoo.recipe import ResolvedRecipe, Stage, build_schedule, build_task, optimizer_factory
from lbzoo.sharding import whole
from lbzoo.tasks.base import Task


class Engine(Protocol):
    """What a module of this folder that is named as ``trainer.engine`` has."""

    def train_stage(self, stage_run: StageRun, module: Task) -> int:
        """Train ``module`` from ``stage_run.step`` to ``stage_run.last_step``, with its callbacks, loggers, loaders.

        Returns the step it ended at, which is an earlier one where a callback asked for the end.
        """

    def evaluate(self, recipe: ResolvedRecipe, world: World, module: Task, loader: Any) -> Mapping[str, float]:
        """What a pass over the validation data logs."""


def train(
    recipe: ResolvedRecipe, sources: Mapping[str, DataSource], world: World, run: RunFolder, start: Start
) -> Outcome:
    """Train every stage that is left, each from the weights of the one before. ``sources`` are its data by stage."""
    _set_threads(recipe, world)
    # One for all stages: what comes while one of them ends, in its last validation, stops the next.
    signals = StopSignals(partial(_leave_at_once, run, world), recipe.checkpoint.requeue_signal)
    signals.install()
    try:
        return _train_stages(recipe, sources, world, run, start, signals)
    finally:
        signals.restore()


def _train_stages(
    recipe: ResolvedRecipe,
    sources: Mapping[str, DataSource],
    world: World,
    run: RunFolder,
    start: Start,
    signals: StopSignals,
) -> Outcome:
    engine = _engine(recipe)
    rollbacks = Rollbacks(run, recipe.trainer.divergence)
    module: Task | None = None
    outcome = _outcome_so_far(start)
    first = int(start.state["stage_index"]) if start.state else 0
    for stage in recipe.stages[first:]:
        earlier, here = module, start if stage.index == first else Start()
        is_over = False
        while not is_over:
            module = _module_at_start(recipe, stage, earlier, start.weights, rollbacks.lr_factor(stage))
            if here.ends(stage):
                assert here.checkpoint is not None
                load_weights(here.checkpoint, module)  # saved at the end of this stage
                break
            stage_run = StageRun(
                recipe, stage, sources[stage.name], world, run, here, module, signals,
                rollbacks=len(rollbacks.made), earlier_step=outcome.step,
            )  # fmt: skip
            try:
                step = engine.train_stage(stage_run, module)
                outcome, is_over = stage_run.outcome(step), True
            except DivergedError as error:
                here = _last_checkpoint(run, stage)
                rollbacks.make(error, stage, max(here.step, stage.first_step))
            finally:
                stage_run.close()
    return outcome


def evaluate(recipe: ResolvedRecipe, source: DataSource, world: World, weights: Path) -> dict[str, float]:
    """The validation metrics of a checkpoint's weights on the data of the recipe's last stage."""
    _set_threads(recipe, world)
    stage = recipe.stages[-1]
    module = build_module(recipe, stage)
    ema = recipe.trainer.ema
    load_weights(weights, module, averaged=ema is not None and ema.in_validation)
    loader = validation_loader(recipe, stage, source, world)
    try:
        metrics = _engine(recipe).evaluate(recipe, world, module, loader)
    finally:
        loader.close()
    return {name: float(value) for name, value in metrics.items()}


def _engine(recipe: ResolvedRecipe) -> Engine:
    return cast("Engine", importlib.import_module(f"lbzoo.engines.{recipe.trainer.engine}"))


def build_module(recipe: ResolvedRecipe, stage: Stage, lr_factor: float = 1.0) -> Task:
    """The same initial weights on every rank and for every layout: drawn on the CPU from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    module = build_task(stage)
    module.bind(optimizer_factory(stage), scaled(build_schedule(stage), lr_factor))
    checkpoint_activations(module, recipe.trainer)
    return module


def _module_at_start(
    recipe: ResolvedRecipe, stage: Stage, earlier: Task | None, weights: Path | None, lr_factor: float
) -> Task:
    """A stage's module with the weights that it begins from, of the stage before or of ``--init-from``."""
    module = build_module(recipe, stage, lr_factor)
    if earlier is not None:
        _carry_weights(earlier, module)
    elif weights is not None:
        load_weights(weights, module, averaged=validates_averages(weights), shared=module.shared_weights)
    return module


def _leave_at_once(run: RunFolder, world: World, signum: int) -> None:
    if world.rank == 0:
        run.write_status("interrupted", exit_code=128 + signum)


def _outcome_so_far(start: Start) -> Outcome:
    """What a run that is resumed after its last step ends with."""
    state = start.state or {}
    best = {"monitor": "", "mode": "", **state.get("best", {})}
    return Outcome(start.step, dict(state.get("metrics", {})), Best(**best))


def _last_checkpoint(run: RunFolder, stage: Stage) -> Start:
    """The newest whole one of this stage; the stage's beginning where there is none. On every rank."""
    point = distributed.on_rank_zero(lambda: resume_point(run))
    state = read_state(point) if point is not None else None
    return Start(point, state) if state is not None and int(state["step"]) > stage.first_step else Start()


def _carry_weights(earlier: Task, later: Task) -> None:
    """Start a stage from the weights of the one before: every entry of the same name and shape."""
    own, given = later.state_dict(), earlier.state_dict()
    names = names_in_common("the stage before", shapes(own), shapes(given), later.shared_weights)
    if not names:
        raise CheckpointError(
            "the stages share no parameter: the later one cannot start from the earlier one's weights"
        )
    later.load_state_dict({**own, **{name: whole(given[name]) for name in names}})


def _set_threads(recipe: ResolvedRecipe, world: World) -> None:
    """One thread for the small models of --scale mini and smoke on a CPU, unless OMP_NUM_THREADS says otherwise.

    Their kernels are too short to share, and threads that wait for each other on a busy machine are many times slower.
    """
    if world.accelerator == "cpu" and recipe.scale != "paper" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
