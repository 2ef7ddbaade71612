"""Results of rows that nobody trained: a fit that only says what it was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbzoo.engines.run import RunResult
from lbzoo.engines.run_folder import create_run
from lbzoo.recipe import load_recipe


@dataclass
class FakeFit:
    """Writes a run folder as the engine does, with the metrics that ``answer`` gives for a recipe."""

    answer: Callable[[Any], dict[str, float]] = lambda recipe: {"val/top1": 0.5, "val/top5": 0.75}
    state: str = "finished"
    trained_hash: str | None = None
    calls: list[Any] = field(default_factory=list)
    resumed: list[Path | None] = field(default_factory=list)

    def __call__(self, recipe: Path, overrides: Any, *, scale: Any, resume: Any, runs: Path, say: Any) -> RunResult:
        resolved = load_recipe(recipe, overrides, scale)
        self.calls.append(resolved)
        self.resumed.append(resume)
        metrics = self.answer(resolved)
        run = create_run(runs, resolved.name)
        run.recipe_file.write_text("version: 1\n")
        exit_code = {"finished": 0, "interrupted": 130, "diverged": 3}.get(self.state, 1)
        trained = {"recipe_hash": self.trained_hash or resolved.hash}  # of the samples that are there
        run.write_status(self.state, step=7, metrics=metrics, scale=scale, exit_code=exit_code, **trained)  # type: ignore[arg-type]
        return RunResult(run.path, self.state, exit_code, 7, metrics)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
