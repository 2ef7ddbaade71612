"""The Lightning engine: each stage of a recipe is one Trainer in this process.

Lightning runs the loop; what it would do differently from one number of devices to another, or from one start to the
next, is done here: the sampler is ours (arithmetic, so a resume replays nothing), checkpoints are ours (one format for
every engine), and its counters are set to the step the run stands at (``trainer_setup.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lbzoo.engines.launch import World
from lbzoo.engines.stage_run import StageRun
from lbzoo.engines.trainer_setup import QUIET, hardware, quiet_lightning, set_counters
from lbzoo.recipe import ResolvedRecipe
from lbzoo.tasks.base import Task


def train_stage(stage_run: StageRun, module: Task) -> int:
    recipe = stage_run.recipe
    with quiet_lightning():
        trainer = pl.Trainer(
            **hardware(recipe, stage_run.world),
            **QUIET,
            logger=stage_run.loggers(),
            callbacks=[*stage_run.callbacks, *([_OwedValidation()] if stage_run.validation_owed else [])],
            max_steps=stage_run.last_step,
            max_epochs=-1,
            accumulate_grad_batches=stage_run.accumulate,
            gradient_clip_val=recipe.trainer.gradient_clip_norm,
            val_check_interval=stage_run.validate_every * stage_run.accumulate,
            check_val_every_n_epoch=None,
            log_every_n_steps=recipe.logging.every,
            default_root_dir=str(stage_run.run.path),
        )
        trainer.first_step = stage_run.stage.first_step  # type: ignore[attr-defined]  # for callbacks: see TrainerView
        set_counters(trainer, stage_run.step, stage_run.accumulate)
        _log_at_optimizer_steps(trainer)
        try:
            trainer.fit(module, stage_run.train_loader(), stage_run.val_loader())
        except MisconfigurationException as error:
            if "closure" not in str(error):
                raise
            raise stage_run.closure_not_run() from error
    return int(trainer.global_step)


def evaluate(recipe: ResolvedRecipe, world: World, module: Task, loader: Any) -> Mapping[str, float]:
    with quiet_lightning():
        trainer = pl.Trainer(**hardware(recipe, world), **QUIET, logger=False)
        (metrics,) = trainer.validate(module, loader, verbose=False)
    return metrics


def _log_at_optimizer_steps(trainer: pl.Trainer) -> None:
    """Have what the module logs logged at the optimizer step that it belongs to.

    Lightning counts from 0, so that step n and the validation after it would stand at n - 1; and it adds an ``epoch``
    of its own, which counts passes of the loader and is always 0 here.
    """
    connector = trainer._logger_connector
    log_metrics = connector.log_metrics

    def log(metrics: Any, step: int | None = None) -> None:
        log_metrics(metrics, trainer.global_step if step is None else step)

    connector.log_metrics = log  # type: ignore[method-assign]


class _OwedValidation(pl.Callback):
    """The validation that a run owed when it was stopped, before its next step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
