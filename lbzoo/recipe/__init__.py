"""Recipes: YAML files, checked and settled into plain data that both engines run."""

from lbzoo.recipe.nodes import Origin, Problem, RecipeError
from lbzoo.recipe.resolved import Component, ResolvedRecipe, Stage
from lbzoo.recipe.schema import (
    CheckpointSettings,
    Interval,
    LoggingSettings,
    LrScalingSettings,
    Recipe,
    ScheduleSettings,
    TrainerSettings,
)

__all__ = [
    "CheckpointSettings",
    "Component",
    "Interval",
    "LoggingSettings",
    "LrScalingSettings",
    "Origin",
    "Problem",
    "Recipe",
    "RecipeError",
    "ResolvedRecipe",
    "ScheduleSettings",
    "Stage",
    "TrainerSettings",
]
