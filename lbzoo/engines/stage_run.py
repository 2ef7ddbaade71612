"""One stage of a run as every engine trains it: its steps, data, loggers and callbacks.

Steps in logs and checkpoints count over the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from lbzoo import scaling
from lbzoo.callbacks.gradient_stats import StatsForOptimizers
from lbzoo.data.base import DataSource
from lbzoo.data.loader import Loader, train_loader, val_loader
from lbzoo.data.wordpiece import HasVocabulary
from lbzoo.engines import distributed
from lbzoo.engines.checkpointer import Best, Checkpointer
from lbzoo.engines.compiled import CompileModel
from lbzoo.engines.divergence import LogRollbacks, divergence_monitor
from lbzoo.engines.global_items import GlobalItems, ReadAhead
from lbzoo.engines.launch import World
from lbzoo.engines.loggers import build_loggers
from lbzoo.engines.run_callbacks import (
    AverageStatistics,
    FreeGatheredWeights,
    MicroBatchSeeds,
    Restore,
)
from lbzoo.engines.run_folder import RunFolder, package_versions
from lbzoo.engines.signals import StopSignals
from lbzoo.engines.weight_average import AverageWeights
from lbzoo.errors import UsageError
from lbzoo.recipe import Component, ResolvedRecipe, Stage, build_callbacks
from lbzoo.tasks.base import Task


@dataclass(frozen=True)
class Start:
    """Where a run begins: ``checkpoint`` is continued exactly; ``weights`` are only loaded into a fresh first stage."""

    checkpoint: Path | None = None
    state: Mapping[str, Any] | None = None
    weights: Path | None = None

    @property
    def step(self) -> int:
        return int(self.state["step"]) if self.state else 0

    def ends(self, stage: Stage) -> bool:
        """Whether it is the stage's end: its last step, or an earlier one where a callback asked for the end."""
        return self.step >= stage.first_step + stage.steps or bool(self.state and self.state.get("stage_over"))


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show: its last step, the last validation, the best one."""

    step: int
    metrics: dict[str, float]
    best: Best


class StageRun:
    """What an engine needs to train ``module`` for a stage.

    ``step`` is the optimizer step the run stands at and ``last_step`` the one the stage ends with; ``accumulate``
    counts micro-batches of a rank in a step, ``validate_every`` optimizer steps. ``callbacks`` are in the order they
    are called in. Where ``validation_owed``, a validation comes before the first step. ``rollbacks``: made by the run
    so far. ``earlier_step``: the one that the stage before has ended with. However the stage ends, :meth:`close`
    comes after.
    """

    def __init__(
        self,
        recipe: ResolvedRecipe,
        stage: Stage,
        source: DataSource,
        world: World,
        run: RunFolder,
        start: Start,
        module: Task,
        signals: StopSignals,
        *,
        rollbacks: int = 0,
        earlier_step: int = 0,
    ) -> None:
        self.recipe, self.stage, self.source = recipe, stage, source
        self.world, self.run = world, run
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
        state = start.state or {}
        self._loaders: list[Loader] = []
        self.validation_owed = bool(state.get("validation_owed"))
        self.signals = signals
        self._average = AverageWeights(recipe.trainer.ema) if recipe.trainer.ema is not None else None
        self._divergence = divergence_monitor(recipe, stage, source, run, world_size=world.world_size)
        self._stateful = [*([self._divergence] if self._divergence is not None else []), *_recipe_callbacks(recipe)]
        self._earlier_step = earlier_step
        self._checkpointer = self._make_checkpointer(module, state)
        self._items = GlobalItems(self.accumulate, module) if GlobalItems.needed_by(module) else None
        self.callbacks: list[Callback] = [
            FreeGatheredWeights(),
            MicroBatchSeeds(recipe.seed),
            *([self._items] if self._items is not None else []),
            AverageStatistics(),
            *([CompileModel(recipe.trainer.compile)] if recipe.trainer.compile else []),
            *([self._average] if self._average is not None else []),
            self._restore(start),
            *self._stateful,
            *([LogRollbacks(rollbacks, every=recipe.logging.every)] if rollbacks else []),
            StatsForOptimizers(micro_batch_size=stage.micro_batch_size),
            self._checkpointer,
        ]

    def outcome(self, step: int) -> Outcome:
        """Of the stage, which ended at ``step``."""
        return Outcome(step, self._checkpointer.metrics, self._checkpointer.best)

    def train_loader(self) -> Loader | ReadAhead:
        """This rank's micro-batches of the steps that are left."""
        stage = self.stage
        loader = train_loader(
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
        self._loaders.append(loader)
        return loader if self._items is None else self._items.read_ahead(loader)

    def val_loader(self) -> Loader:
        loader = validation_loader(self.recipe, self.stage, self.source, self.world)
        self._loaders.append(loader)
        return loader

    def close(self) -> None:
        """End the loaders' processes."""
        self.signals.saves = False
        for loader in self._loaders:
            loader.close()

    def loggers(self) -> list[Logger]:
        return build_loggers(self.recipe, self.run, resume_step=self.step, describe_step=self._progress)

    def closure_not_run(self) -> UsageError:
        """The error of an optimizer that left out the forward and backward pass."""
        return UsageError(
            f"optimizer '{self.stage.optimizer.name}' did not run the closure that its step() was given, and in it "
            "the forward and backward pass; see `lbzoo optim check`"
        )

    def _restore(self, start: Start) -> Restore:
        stage = self.stage
        keeps = stage.keeps_optimizer and stage.index > 0
        return Restore(
            start.checkpoint,
            self.step - stage.first_step,
            self._average,
            stateful=self._stateful,
            optimizer_from=self.run.checkpoints.step_path(self._earlier_step) if keeps else None,
        )

    def _make_checkpointer(self, module: Task, state: Mapping[str, Any]) -> Checkpointer:
        best = Best(module.monitor, module.mode)
        if state.get("best", {}).get("monitor") == module.monitor:
            best = Best(**{**state["best"], "mode": module.mode})
        settings = self.recipe.checkpoint
        return Checkpointer(
            self.run,
            last_step=self.last_step,
            every_steps=settings.every_steps or self.validate_every,
            validate_every=self.validate_every,
            keep_last=settings.keep_last,
            save_best=settings.save_best,
            best=best,
            metrics=dict(state.get("metrics", {})),
            describe=self._describe,
            signals=self.signals,
            stateful=self._stateful,
            in_background=distributed.background_saver() if settings.asynchronous else None,
            warn=settings.on_error == "warn",
            average=self._average,
            before_save=self._divergence.check_weights if self._divergence is not None else None,
        )

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
            "ema": self.recipe.trainer.ema.model_dump() if self.recipe.trainer.ema is not None else None,
            "vocabulary": self.source.vocabulary.digest if isinstance(self.source, HasVocabulary) else None,
            "world_size": self.world.world_size,
            "engine": self.recipe.trainer.engine,
            "versions": package_versions(),
        }


def validation_loader(recipe: ResolvedRecipe, stage: Stage, source: DataSource, world: World) -> Loader:
    """This rank's part of the stage's validation data."""
    return val_loader(
        source,
        micro_batch_size=stage.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=recipe.trainer.num_workers,
        pin_memory=world.accelerator == "cuda",
    )


def _recipe_callbacks(recipe: ResolvedRecipe) -> list[Callback]:
    """The recipe's callbacks, and what every run shows unless the recipe says how itself."""
    named = {callback.name for callback in recipe.callbacks}
    always = [
        Component("train_metrics", {"every": recipe.logging.every}),
        Component("progress"),
        Component("unreadable_images"),
    ]
    missing = tuple(component for component in always if component.name not in named)
    return build_callbacks(replace(recipe, callbacks=(*missing, *recipe.callbacks)))
