"""Runs in processes of their own that are killed; importable by those processes.

They are forked from a server that has imported everything, so that a start costs no imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fit_jobs import as_if_launched

from lbzoo.engines import fit
from lbzoo.engines.run_callbacks import Restore

PRELOAD = ["lbzoo.engines.lightning", "lbzoo.engines.accelerate", "lbzoo.tasks.image_classification", "kill_jobs"]


def run_until_killed(recipe: Path, overrides: list[str], runs: Path, steps: list[int]) -> int:
    """Start the run and kill it when it has logged each of ``steps``, then let it end; the number of kills."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    log = runs / recipe.stem / "1" / "metrics.jsonl"
    kills = 0
    for step in [*steps, None]:
        process = context.Process(target=_fit, args=(recipe, overrides, runs))
        process.start()
        while process.is_alive():
            if step is not None and _last_step(log) >= step:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                process.join()
            time.sleep(0.002)
        assert process.exitcode == (0 if step is None else -signal.SIGKILL), "it ended by itself"
    return kills


def exit_code_of(function: Callable[..., object], *args: Any) -> int | None:
    """That of a process which calls ``function``, and ends with all that is done in the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def fit_with_a_signal_at_the_start(recipe: Path, overrides: list[str], runs: Path, signum: int) -> None:
    """While the model is put in its place, before the first step."""

    def hook(*args: Any) -> None:
        os.kill(os.getpid(), signum)

    with patch.object(Restore, "on_fit_start", hook):
        fit(recipe, overrides, runs=runs)


def _fit(recipe: Path, overrides: list[str], runs: Path) -> None:
    with as_if_launched():
        fit(recipe, overrides, runs=runs, resume="auto")


def _last_step(log: Path) -> int:
    """The last one in ``metrics.jsonl``, which is being written to."""
    try:
        lines: list[Any] = log.read_bytes().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0
