"""``metrics.jsonl``: one JSON object a logged step, as a Lightning logger."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger


class MetricsFile(Logger):
    """Appends to ``path``; everything logged at one step becomes one line, written when the next step is logged.

    Args:
        path: the file. Lines after ``resume_step`` are dropped first: a resumed run writes them again.
        resume_step: optimizer steps done before this start (0 for a fresh run).
        describe_step: what else a line says of a step: ``stage``, ``epoch``, ``samples``.
    """

    skips_layers = True  # per-layer values are for TensorBoard; here they would bury the scalars

    def __init__(self, path: Path, resume_step: int, describe_step: Callable[[int], Mapping[str, Any]]) -> None:
        super().__init__()
        self._path = path
        self._resume_step = resume_step
        self._describe_step = describe_step
        self._step: int | None = None
        self._values: dict[str, float] = {}
        self._started = time.time()
        self._opened = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The recipe lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add scalars to the line of ``step``."""
        step = step if step is not None else (self._step or 0)
        if step != self._step:
            self.save()
            self._step = step
        # Lightning adds an "epoch" of its own, which counts loader passes; ours is in describe_step.
        self._values.update({name: float(value) for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def save(self) -> None:
        """Write the pending line."""
        if not self._values or self._step is None:
            return
        if not self._opened:
            _drop_lines_after(self._path, self._resume_step)
            self._opened = True
        line = {"step": self._step, **self._describe_step(self._step), "time": round(time.time() - self._started, 3)}
        line |= {name: _json_number(value) for name, value in self._values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._values = {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line.get("step", 0) <= step]
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    beside.replace(path)


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as strings."""
    return value if math.isfinite(value) else repr(value)
