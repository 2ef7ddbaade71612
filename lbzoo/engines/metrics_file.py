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

from lbzoo.engines.log_fault import LogFault


class MetricsFile(Logger):
    """Appends to ``path``; everything logged at one step becomes one line. ``time`` counts seconds over all starts.

    A line that cannot be written (a full disk) is lost, with a warning.

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
        self._fault = LogFault(str(path))
        self._line: dict[str, Any] = {}  # of the step that is being logged
        self._offset: int | None = None  # in the file, where that line begins; None before the first value
        self._end = 0  # where it ends, as it was written last
        self._started = time.monotonic()  # the clock on the wall may be set in between

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self._path.parent)

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
        if self._offset is None:
            self._line, self._offset, self._end, seconds = _reopen(self._path, self._resume_step)
            self._started -= seconds
        step = step if step is not None else int(self._line.get("step", 0))
        if step != self._line.get("step"):
            self.save()
            self._offset = self._end
            seconds = round(time.monotonic() - self._started, 3)
            self._line = {"step": step, **self._describe_step(step), "time": seconds}
        # Lightning adds an "epoch" of its own, which counts loader passes; ours is in describe_step.
        self._line |= {name: _json_number(float(value)) for name, value in metrics.items() if name != "epoch"}

    @rank_zero_only
    def save(self) -> None:
        """Write the line of the step that is being logged; what the step logs later replaces it."""
        if self._offset is None or not self._line:
            return
        text = (json.dumps(self._line) + "\n").encode()
        with self._fault.forgiven(), self._path.open("r+b" if self._path.exists() else "w+b") as file:
            file.seek(self._offset)
            file.write(text)  # over the shorter line of this step: a kill in between loses nothing
            file.truncate()
            file.flush()
            self._end = self._offset + len(text)

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


def _reopen(path: Path, resume_step: int) -> tuple[dict[str, Any], int, int, float]:
    """The line of ``resume_step``, to which more may come, where it begins and ends, and the seconds the run had taken.

    The lines after it are dropped.
    """
    if not path.exists():
        return {}, 0, 0, 0.0
    lines = read_metrics(path)
    before = [line for line in lines if line.get("step", 0) < resume_step]
    last = next((line for line in lines if line.get("step") == resume_step), {})
    text = "".join(json.dumps(line) + "\n" for line in before)
    whole = text + (json.dumps(last) + "\n" if last else "")
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(whole, encoding="utf-8")
    beside.replace(path)
    seconds = float((last or (before[-1] if before else {})).get("time", 0.0))
    return last, len(text.encode()), len(whole.encode()), seconds


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as strings."""
    return value if math.isfinite(value) else repr(value)
