"""A recipe after everything is settled: plain data that the engines run.

Nothing here is read from a file, scaled, defaulted or looked up any more: base, scale block, overrides, stages, data
facts and learning-rate scaling have been applied (``resolving.py``), and every value remembers where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbzoo.recipe.nodes import KeyPath, Origin
from lbzoo.recipe.schema import (
    CheckpointSettings,
    HardwareSettings,
    LoggingSettings,
    LrScalingSettings,
    Scale,
    ScheduleSettings,
    TableSettings,
    TrainerSettings,
)


@dataclass(frozen=True)
class Component:
    """A task, data set, optimizer or callback: its registered name and the options to construct it with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage of a run. Batch sizes count samples, steps are optimizer steps."""

    name: str
    index: int
    task: Component
    data: Component
    optimizer: Component
    """Options include ``lr``, after scaling."""
    param_rules: tuple[dict[str, Any], ...]
    schedule: ScheduleSettings
    """Warmup epochs are scaled."""
    global_batch_size: int
    micro_batch_size: int
    """While ``finds_micro_batch_size``, the least that it can be: 1."""
    steps: int
    """Optimizer steps of this stage."""
    first_step: int
    """Optimizer steps of all stages before this one."""
    num_train: int
    """Training samples of an epoch."""
    finds_micro_batch_size: bool = False
    """The recipe says ``auto``, and the engine has not yet found the size (``with_micro_batch_sizes``)."""
    keeps_optimizer: bool = False
    """Go on with the optimizer's state of the stage before."""
    epochs: float | None = None
    """What the recipe asked for, where it asked for epochs."""
    lr_before_scaling: float | None = None
    lr_scaling: LrScalingSettings | None = None
    origins: Mapping[KeyPath, Origin] = field(default_factory=dict, repr=False, compare=False)
    """Where each value of the stage was written, by its path in the stage: ``("optimizer", "lr")``."""

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps that see as many samples as the data set has; seldom whole."""
        return self.num_train / self.global_batch_size


@dataclass(frozen=True)
class ResolvedRecipe:
    """What ``load_recipe`` returns."""

    name: str
    """The file's stem."""
    path: Path | None
    scale: Scale
    description: str
    """The comment that the file begins with."""
    seed: int
    stages: tuple[Stage, ...]
    callbacks: tuple[Component, ...]
    trainer: TrainerSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings
    plugins: tuple[Path, ...]
    table: TableSettings | None
    hardware: HardwareSettings | None
    expect: Mapping[str, float]
    notes: tuple[str, ...]
    """What resolving changed of its own accord and the user should know."""
    document: dict[str, Any]
    """The merged recipe, scale block and overrides applied, as data that can be written as YAML and read again."""
    hash: str
    """Of everything that changes the training: not of devices, logging, checkpoints or callbacks."""
    origins: Mapping[KeyPath, Origin]
    """Where each value of ``document`` was written, by its path."""
