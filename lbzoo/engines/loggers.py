"""The loggers of a run, from their names in the recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lbzoo.engines.metrics_file import MetricsFile
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import UsageError
from lbzoo.recipe import ResolvedRecipe


def build_loggers(
    recipe: ResolvedRecipe,
    run: RunFolder,
    *,
    resume_step: int,
    describe_step: Callable[[int], Mapping[str, Any]],
) -> list[Logger]:
    """``metrics.jsonl`` always, and the recipe's. After a resume each step stands once in every log."""
    loggers: list[Logger] = [MetricsFile(run.metrics_file, resume_step, describe_step)]
    for name in recipe.logging.loggers:
        loggers.append(_build(name, recipe, run, resume_step))
    if not resume_step:
        values = flatten(recipe.document)
        for logger in loggers:
            logger.log_hyperparams(values)
    return loggers


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; lists of plain values stay as text."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _build(name: str, recipe: ResolvedRecipe, run: RunFolder, resume_step: int) -> Logger:
    if name == "tensorboard":
        # Events after resume_step are of the run that was cut off: TensorBoard drops them.
        purge: dict[str, Any] = {"purge_step": resume_step + 1} if resume_step else {}
        return TensorBoardLogger(str(run.path), name="tensorboard", version="", default_hp_metric=False, **purge)
    if name == "csv":
        # A CSVLogger empties a folder that it finds filled.
        return CSVLogger(str(run.path), name="csv", version=f"from_step_{resume_step}")
    if name in _SERVICES:
        kind = getattr(importlib.import_module("lightning.pytorch.loggers"), _SERVICES[name])
        try:
            return kind(save_dir=str(run.path), name=recipe.name)  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            raise UsageError(f"logging.loggers: {name} needs its package: pip install {name}") from error
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UsageError(f"logging.loggers: cannot build '{name}': {error}") from error


_SERVICES = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger", "comet": "CometLogger", "neptune": "NeptuneLogger"}
