"""The loggers of a run, from their names in the recipe."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lbzoo.engines.event_files import drop_events_after
from lbzoo.engines.log_fault import LogFault
from lbzoo.engines.metrics_file import MetricsFile
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import LbzooError, UsageError
from lbzoo.ranks import is_first_rank
from lbzoo.recipe import ResolvedRecipe


def build_loggers(
    recipe: ResolvedRecipe,
    run: RunFolder,
    *,
    resume_step: int,
    describe_step: Callable[[int], Mapping[str, Any]],
) -> list[Logger]:
    """``metrics.jsonl`` always, and the recipe's. After a resume each step stands once in every log."""
    if is_first_rank():
        _cut_back(run, resume_step)
    loggers: list[Logger] = [MetricsFile(run.metrics_file, resume_step, describe_step)]
    for name in recipe.logging.loggers:
        loggers.append(_build(name, recipe, run, resume_step))
    if not resume_step:
        values = flatten(recipe.document)
        for logger in loggers:
            logger.log_hyperparams(values)
    return loggers


class _TensorBoard(TensorBoardLogger):
    """One that outlives a full disk."""

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        is_new = self._experiment is None
        try:
            writer: SummaryWriter = super().experiment
        except OSError as error:
            raise LbzooError(f"cannot write the events of TensorBoard: {error}; choose --runs DIR") from error
        if is_new:
            fault = LogFault(self.log_dir)
            events = writer._get_file_writer().event_writer
            for name in ("add_event", "flush", "close"):
                setattr(events, name, fault.forgiving(getattr(events, name)))
        return writer


class _Csv(CSVLogger):
    """One that outlives a full disk."""

    def __init__(self, folder: str, version: str) -> None:
        super().__init__(folder, name="csv", version=version)
        self._fault = LogFault(self.log_dir)

    def save(self) -> None:
        with self._fault.forgiven():
            super().save()


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; lists of plain values stay as text."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _cut_back(run: RunFolder, step: int) -> None:
    """Drop what an earlier start has logged after ``step``; ``metrics.jsonl`` sees to itself."""
    drop_events_after(run.tensorboard, step)
    for file in run.path.glob("csv/from_step_*/metrics.csv"):
        with file.open(encoding="utf-8", newline="") as lines:
            head, *rows = [*csv.reader(lines)] or [[]]
        whole = [row for row in rows if len(row) == len(head)]  # a kill may cut the last one short
        kept = [row for row in whole if int(row[head.index("step")]) <= step]
        if len(kept) < len(rows):
            with file.open("w", encoding="utf-8", newline="") as lines:
                csv.writer(lines).writerows([head, *kept])


def _build(name: str, recipe: ResolvedRecipe, run: RunFolder, resume_step: int) -> Logger:
    if name == "tensorboard":
        return _TensorBoard(str(run.path), name="tensorboard", version="", default_hp_metric=False)
    if name == "csv":
        # A CSVLogger empties a folder that it finds filled.
        return _Csv(str(run.path), f"from_step_{resume_step}")
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
