"""The hash of what a recipe trains: a run is resumed only by the recipe that began it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lbzoo.recipe.resolved import Stage
from lbzoo.recipe.schema import TrainerSettings

# Options that say where data lies do not change what is trained on it.
_LOCATIONS = ("root", "path", "folder")
_OF_TRAINER = ("precision", "gradient_clip_norm", "ema")
_OF_THE_RUN = ("seed", "task", "data", "optimizer", "schedule", "lr_scaling", "epochs", "steps", "stages")


def changes_training(path: str) -> bool:
    """Whether a value of a recipe's document, by its dotted path, is part of the hash."""
    first, _, rest = path.partition(".")
    if first == "trainer":
        return rest.startswith(_OF_TRAINER)
    return first in _OF_THE_RUN and not (first == "data" and rest in _LOCATIONS)


def training_hash(seed: int, stages: Sequence[Stage], trainer: TrainerSettings) -> str:
    """Of everything that changes the training; devices, engine, logging, checkpoints and callbacks do not."""
    facts: dict[str, Any] = {
        "seed": seed,
        "precision": trainer.precision,
        "gradient_clip_norm": trainer.gradient_clip_norm,
        "stages": [_training_facts(stage) for stage in stages],
    }
    if trainer.ema is not None:  # added later: the hashes of recipes without it stay what they were
        facts["ema"] = trainer.ema.model_dump()
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _training_facts(stage: Stage) -> dict[str, Any]:
    data = {option: value for option, value in stage.data.options.items() if option not in _LOCATIONS}
    facts: dict[str, Any] = {
        "task": [stage.task.name, stage.task.options],
        "data": [stage.data.name, data],
        "optimizer": [stage.optimizer.name, stage.optimizer.options, stage.param_rules],
        "schedule": stage.schedule.model_dump(exclude_none=True),
        "global_batch_size": stage.global_batch_size,
        "micro_batch_size": "auto" if stage.finds_micro_batch_size else stage.micro_batch_size,
        "steps": stage.steps,
        "num_train": stage.num_train,
    }
    return {**facts, "keeps_optimizer": True} if stage.keeps_optimizer else facts  # added later, as above
