"""Components of a resolved recipe, constructed. What they need is imported here and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lbzoo import schedules
from lbzoo.recipe.components import component_class
from lbzoo.recipe.resolved import ResolvedRecipe, Stage
from lbzoo.signatures import options_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from torch import nn
    from torch.optim import Optimizer

    from lbzoo.data.base import DataSource
    from lbzoo.tasks.base import Task


def build_data(stage: Stage) -> DataSource:
    """The stage's data set; its files are not touched."""
    source: DataSource = component_class("data", stage.data.name)(**stage.data.options)
    return source


def build_task(stage: Stage) -> Task:
    """The stage's task with a freshly initialised model, on torch's default device."""
    task: Task = component_class("task", stage.task.name)(**stage.task.options)
    return task


def build_schedule(stage: Stage) -> schedules.Schedule:
    """The stage's learning-rate multiplier by optimizer step, 1 to ``stage.steps``."""
    settings: dict[str, Any] = stage.schedule.model_dump(exclude_none=True)
    return schedules.build_schedule(steps=stage.steps, steps_per_epoch=stage.steps_per_epoch, **settings)


def optimizer_factory(stage: Stage) -> Callable[[nn.Module], Optimizer]:
    """A function that builds the stage's optimizer for a module."""

    def build(module: nn.Module) -> Optimizer:
        from lbzoo.optim import create_optimizer

        return create_optimizer(module, stage.optimizer.name, param_rules=stage.param_rules, **stage.optimizer.options)

    return build


def build_callbacks(recipe: ResolvedRecipe) -> list[Callback]:
    """The recipe's callbacks, in its order; ``every`` is ``logging.every`` where the recipe does not say otherwise."""
    callbacks = []
    for callback in recipe.callbacks:
        kind = component_class("callback", callback.name)
        every = {"every": recipe.logging.every} if "every" in options_of(kind) else {}
        callbacks.append(kind(**{**every, **callback.options}))
    return callbacks
