"""The answers to SQuAD's questions as files, for the official evaluation and for reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lbzoo.callbacks.trainer_view import TrainerView
from lbzoo.registry import register_callback

PREDICTIONS, N_BEST = "predictions.json", "nbest_predictions.json"


@register_callback("squad_predictions")
class SquadPredictions(Callback):
    """After each validation of the task squad: predictions.json in SQuAD's own format, and the n best with scores.

    They are written to the first logger's folder, that of the run, and replace those of the validation before. Other
    tasks are left alone.
    """

    def __init__(self) -> None:  # so that its options, none, are known without importing it
        super().__init__()

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        predictions = getattr(pl_module, "predictions", None)
        folder = next((Path(logger.save_dir) for logger in trainer.loggers if logger.save_dir), None)
        if not predictions or folder is None or not trainer.is_global_zero or trainer.sanity_checking:
            return
        _write(folder / PREDICTIONS, predictions)
        _write(folder / N_BEST, getattr(pl_module, "n_best_predictions", {}))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
