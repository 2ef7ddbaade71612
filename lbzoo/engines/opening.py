"""The run folder that a call of ``fit`` works in: a new one, or one that is resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lbzoo.checkpoint.folder import read_state, resolve_checkpoint
from lbzoo.engines.launch import RUN_FOLDER_VARIABLE
from lbzoo.engines.run_folder import RunFolder, create_run, find_unfinished, run_of
from lbzoo.errors import CheckpointError, UsageError
from lbzoo.recipe import ResolvedRecipe, to_yaml, with_micro_batch_sizes

Say = Callable[[str], None]


def open_run(resolved: ResolvedRecipe, resume: str | Path | None, runs: Path, say: Say) -> RunFolder:
    """The run's folder: the launcher's, the one to resume, or a new one with its recipe and environment in it."""
    run: RunFolder | None = None
    if RUN_FOLDER_VARIABLE in os.environ:
        return RunFolder(Path(os.environ[RUN_FOLDER_VARIABLE]))
    if resume == "auto":
        run = find_unfinished(runs, resolved.name, resolved.scale)
        if run is None:
            say("nothing to resume: starting a new run")
    elif resume is not None:
        run = run_of(resolve_checkpoint(Path(resume)))
        wanted = resolve_checkpoint(Path(resume))
        if wanted != resume_point(run):
            raise UsageError(
                f"{wanted.name} is not the last checkpoint of {run.path}; to branch off from it start a new run with "
                f"--init-from {wanted}, or remove the later checkpoints to continue from it"
            )
    if run is not None:
        resolved = with_micro_batch_sizes(resolved, recorded_sizes(run))
        _check_same_recipe(resolved, run)
        point = resume_point(run, say)
        say(f"resuming {run.path} at step {read_state(point)['step'] if point else 0}")
    else:
        run = create_run(runs, resolved.name)
        run.recipe_file.write_text(recipe_text(resolved), encoding="utf-8")
        say(f"run folder: {run.path}")
    run.write_environment()
    for file in run.path.glob("failure_rank*.json"):
        file.unlink()
    run.write_status("running", exit_code=None, error=None, recipe=resolved.name, scale=resolved.scale,
                     recipe_hash=resolved.hash)  # fmt: skip
    return run


def recorded_sizes(run: RunFolder) -> dict[str, int]:
    """By stage: the micro-batch sizes that an earlier start of the run has found, where its recipe says ``auto``."""
    return dict(run.status().get("micro_batch_sizes") or {})


def resume_point(run: RunFolder, say: Say = lambda text: None) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning."""
    steps = run.checkpoints.steps()
    damage: CheckpointError | None = None
    for step in reversed(steps):
        path = run.checkpoints.step_path(step)
        try:
            read_state(path)
        except CheckpointError as error:
            damage = error
            say(f"warning: {error}")
        else:
            return path
    if damage is not None:
        raise damage
    return None


def _check_same_recipe(resolved: ResolvedRecipe, run: RunFolder) -> None:
    if run.status().get("recipe_hash") in (None, resolved.hash):
        return
    earlier = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))
    differing = _differences(earlier, resolved.document)
    raise CheckpointError(
        f"{run.path} was started with another recipe: " + ("; ".join(differing[:8]) or "the resolved values differ")
        + ". Set these as they were, or start a new run from its weights with --init-from"
    )  # fmt: skip


def _differences(earlier: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(earlier, Mapping) and isinstance(now, Mapping):
        keys = sorted({*earlier, *now}, key=str)
        return [d for key in keys for d in _differences(earlier.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if earlier == now else [f"{path} was {earlier!r} and is {now!r}"]


def recipe_text(resolved: ResolvedRecipe) -> str:
    """The resolved recipe as a file of its own: it can be checked, fitted and validated again."""
    head = f"# The recipe of this run, resolved (scale {resolved.scale}, hash {resolved.hash}).\n"
    return head + to_yaml(resolved.document)
