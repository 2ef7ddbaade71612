"""The Lightning engine: each stage of a recipe is one Trainer in this process.

Lightning runs the loop; what it would do differently from one number of devices to another, or from one start to the
next, is done here: the sampler is ours (arithmetic, so a resume replays nothing), checkpoints are ours (one format for
every engine), and its counters are set to the step the run stands at (``trainer_setup.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lbzoo import scaling
from lbzoo.callbacks.gradient_stats import StatsForOptimizers
from lbzoo.checkpoint import load_weights
from lbzoo.data.base import DataSource
from lbzoo.data.loader import train_loader, val_loader
from lbzoo.engines.launch import World
from lbzoo.engines.loggers import build_loggers
from lbzoo.engines.run_callbacks import AtValidation, Best, Checkpointer, MicroBatchSeeds, Restore
from lbzoo.engines.run_folder import RunFolder, environment
from lbzoo.engines.signals import StopSignals
from lbzoo.engines.trainer_setup import QUIET, hardware, quiet_lightning, set_counters, set_threads
from lbzoo.errors import CheckpointError, UsageError
from lbzoo.recipe import (
    Component,
    ResolvedRecipe,
    Stage,
    build_callbacks,
    build_schedule,
    build_task,
    optimizer_factory,
)
from lbzoo.tasks.base import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: ``checkpoint`` is continued exactly; ``weights`` are only loaded into a fresh first stage."""

    checkpoint: Path | None = None
    state: Mapping[str, Any] | None = None
    weights: Path | None = None

    @property
    def step(self) -> int:
        return int(self.state["step"]) if self.state else 0


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show: its last step, the last validation, the best one."""

    step: int
    metrics: dict[str, float]
    best: Best


def train(
    recipe: ResolvedRecipe, sources: Mapping[str, DataSource], world: World, run: RunFolder, start: Start
) -> Outcome:
    """Train every stage that is left, each from the weights of the one before. ``sources`` are its data by stage."""
    set_threads(recipe, world)
    module: Task | None = None
    outcome = Outcome(start.step, dict((start.state or {}).get("metrics", {})), Best("", "max"))
    first = int(start.state["stage_index"]) if start.state else 0
    for stage in recipe.stages[first:]:
        earlier, module = module, _build_module(recipe, stage)
        if earlier is not None:
            _carry_weights(earlier, module)
        elif start.weights is not None:
            load_weights(start.weights, module)
        here = start if stage.index == first else Start()
        if here.step >= stage.first_step + stage.steps:
            assert here.checkpoint is not None
            load_weights(here.checkpoint, module)  # saved at the end of this stage
            continue
        outcome = _StageRun(recipe, stage, sources[stage.name], world, run, here).train(module)
    return outcome


def evaluate(recipe: ResolvedRecipe, source: DataSource, world: World, weights: Path) -> dict[str, float]:
    """The validation metrics of a checkpoint's weights on the data of the recipe's last stage."""
    set_threads(recipe, world)
    stage = recipe.stages[-1]
    module = _build_module(recipe, stage)
    load_weights(weights, module)
    with quiet_lightning():
        trainer = pl.Trainer(**hardware(recipe, world), **QUIET, logger=False)
        loader = _val_loader(recipe, stage, source, world)
        (metrics,) = trainer.validate(module, loader, verbose=False)
    return {name: float(value) for name, value in metrics.items()}


class _StageRun:
    """One stage on one Trainer. Steps in logs and checkpoints count over the whole run."""

    def __init__(
        self, recipe: ResolvedRecipe, stage: Stage, source: DataSource, world: World, run: RunFolder, start: Start
    ) -> None:
        self.recipe, self.stage, self.source = recipe, stage, source
        self.world, self.run, self.start = world, run, start
        self.accumulate = scaling.accumulation(
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            world_size=world.world_size,
        )
        self.step = max(start.step, stage.first_step)
        self.last_step = stage.first_step + stage.steps
        validate = recipe.trainer.validate_every
        epochs = validate.epochs or 0.0
        wanted = validate.steps or max(round(epochs * stage.steps_per_epoch), 1)
        self.validate_every = min(wanted, stage.steps)

    def train(self, module: Task) -> Outcome:
        recipe, stage, state = self.recipe, self.stage, self.start.state or {}
        signals = StopSignals(self._leave_at_once)
        best = Best(module.monitor, module.mode)
        if state.get("best", {}).get("monitor") == module.monitor:
            best = Best(**{**state["best"], "mode": module.mode})
        checkpointer = Checkpointer(
            self.run,
            last_step=self.last_step,
            every_steps=recipe.checkpoint.every_steps or self.validate_every,
            validate_every=self.validate_every,
            keep_last=recipe.checkpoint.keep_last,
            save_best=recipe.checkpoint.save_best,
            best=best,
            describe=self._describe,
            signals=signals,
            validation_owed=bool(state.get("validation_owed")),
        )
        checkpointer.metrics = dict(state.get("metrics", {}))
        callbacks = [
            MicroBatchSeeds(recipe.seed),
            Restore(self.start.checkpoint, self.step - stage.first_step),
            *_callbacks(recipe),
            StatsForOptimizers(micro_batch_size=stage.micro_batch_size),
            AtValidation(),
            checkpointer,
        ]
        with quiet_lightning():
            trainer = pl.Trainer(
                **hardware(recipe, self.world),
                **QUIET,
                logger=self._loggers(),
                callbacks=callbacks,
                max_steps=self.last_step,
                max_epochs=-1,
                accumulate_grad_batches=self.accumulate,
                gradient_clip_val=recipe.trainer.gradient_clip_norm,
                val_check_interval=self.validate_every * self.accumulate,
                check_val_every_n_epoch=None,
                log_every_n_steps=recipe.logging.every,
                default_root_dir=str(self.run.path),
            )
            trainer.first_step = stage.first_step  # type: ignore[attr-defined]  # for callbacks: see TrainerView
            set_counters(trainer, self.step, self.accumulate)
            try:
                trainer.fit(module, self._train_loader(), _val_loader(recipe, stage, self.source, self.world))
            except MisconfigurationException as error:
                if "closure" not in str(error):
                    raise
                raise UsageError(
                    f"optimizer '{stage.optimizer.name}' did not run the closure that its step() was given, and in it "
                    "the forward and backward pass; see `lbzoo optim check`"
                ) from error
            finally:
                signals.restore()
        return Outcome(trainer.global_step, checkpointer.metrics, checkpointer.best)

    def _train_loader(self) -> torch.utils.data.DataLoader[Any]:
        stage = self.stage
        return train_loader(
            self.source,
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            start_step=self.step - stage.first_step,
            steps=stage.steps,
            seed=self.recipe.seed,
            rank=self.world.rank,
            world_size=self.world.world_size,
            num_workers=self.recipe.trainer.num_workers,
            pin_memory=self.world.accelerator == "cuda",
        )

    def _loggers(self) -> list[Logger]:
        return build_loggers(self.recipe, self.run, resume_step=self.step, describe_step=self._progress)

    def _progress(self, step: int) -> dict[str, Any]:
        """What a line of metrics.jsonl says of a step."""
        samples = sum(s.steps * s.global_batch_size for s in self.recipe.stages[: self.stage.index])
        in_stage = (step - self.stage.first_step) * self.stage.global_batch_size
        epoch = round(in_stage / self.stage.num_train, 4)
        return {"stage": self.stage.name, "epoch": epoch, "samples": samples + in_stage}

    def _describe(self, step: int) -> dict[str, Any]:
        """What state.json says of a step apart from metrics."""
        stage = self.stage
        return {
            "recipe": self.recipe.name,
            "recipe_hash": self.recipe.hash,
            "step": step,
            "stage": stage.name,
            "stage_index": stage.index,
            "stage_step": step - stage.first_step,
            **self._progress(step),
            "sampler": {
                "rule": "virtual shards",
                "seed": self.recipe.seed,
                "next_step": step - stage.first_step,
                "global_batch_size": stage.global_batch_size,
                "micro_batch_size": stage.micro_batch_size,
                "num_train": stage.num_train,
            },
            "schedule": {"steps_done": step - stage.first_step, "steps": stage.steps},
            "rng": {"rule": "seeded before each micro-batch from (seed, step, micro-batch)", "seed": self.recipe.seed},
            "world_size": self.world.world_size,
            "versions": environment()["packages"],
        }

    def _leave_at_once(self, signum: int) -> None:
        if self.world.rank == 0:
            self.run.write_status("interrupted", exit_code=128 + signum)


def _build_module(recipe: ResolvedRecipe, stage: Stage) -> Task:
    """The same initial weights on every rank and for every layout: drawn on the CPU from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    module = build_task(stage)
    module.bind(optimizer_factory(stage), build_schedule(stage))
    return module


def _callbacks(recipe: ResolvedRecipe) -> list[pl.Callback]:
    """The recipe's callbacks, and what every run shows unless the recipe says how itself."""
    named = {callback.name for callback in recipe.callbacks}
    always = [Component("train_metrics", {"every": recipe.logging.every}), Component("progress")]
    missing = tuple(component for component in always if component.name not in named)
    return build_callbacks(replace(recipe, callbacks=(*missing, *recipe.callbacks)))


def _carry_weights(earlier: Task, later: Task) -> None:
    """Start a stage from the weights of the one before: every entry of the same name and shape."""
    own = later.state_dict()
    carried = {n: t for n, t in earlier.state_dict().items() if n in own and own[n].shape == t.shape}
    if not carried:
        raise CheckpointError(
            "the stages share no parameter: the later one cannot start from the earlier one's weights"
        )
    fresh = [name for name in own if name not in carried]
    if fresh:
        log.warning("%d entries are new in this stage, the first is %s", len(fresh), fresh[0])
    later.load_state_dict({**own, **carried})


def _val_loader(
    recipe: ResolvedRecipe, stage: Stage, source: DataSource, world: World
) -> torch.utils.data.DataLoader[Any]:
    return val_loader(
        source,
        micro_batch_size=stage.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=recipe.trainer.num_workers,
        pin_memory=world.accelerator == "cuda",
    )
