"""Recipes: YAML files, checked and settled into plain data that both engines run."""

from lbzoo.recipe.build import build_callbacks, build_data, build_schedule, build_task, optimizer_factory
from lbzoo.recipe.nodes import Origin, Problem, RecipeError
from lbzoo.recipe.resolved import Component, ResolvedRecipe, Stage
from lbzoo.recipe.resolving import load_recipe, with_micro_batch_sizes, with_sample_counts
from lbzoo.recipe.schema import (
    CheckpointSettings,
    CompileMode,
    DivergenceSettings,
    EmaSettings,
    Interval,
    LoggingSettings,
    LrScalingSettings,
    Recipe,
    ScheduleSettings,
    TrainerSettings,
)
from lbzoo.recipe.writing import to_yaml

__all__ = [
    "CheckpointSettings",
    "CompileMode",
    "Component",
    "DivergenceSettings",
    "EmaSettings",
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
    "build_callbacks",
    "build_data",
    "build_schedule",
    "build_task",
    "load_recipe",
    "optimizer_factory",
    "to_yaml",
    "with_micro_batch_sizes",
    "with_sample_counts",
]
