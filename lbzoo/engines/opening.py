"""The run folder that a call of ``fit`` works in: a new one, or one that is resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lbzoo.checkpoint.folder import STATE_FILE, read_state, resolve_checkpoint
from lbzoo.engines.launch import RUN_FOLDER_VARIABLE
from lbzoo.engines.run_folder import RunFolder, create_run, find_unfinished, run_of
from lbzoo.engines.run_lock import locked
from lbzoo.errors import CheckpointError, UsageError
from lbzoo.recipe import ResolvedRecipe, to_yaml, with_micro_batch_sizes
from lbzoo.recipe.hashing import changes_training

Say = Callable[[str], None]


@contextmanager
def open_run(resolved: ResolvedRecipe, resume: str | Path | None, runs: Path, say: Say) -> Iterator[RunFolder]:
    """The run's folder: the launcher's, the one to resume, or a new one with its recipe and environment in it.

    Raises UsageError where a run is to be resumed that another process is training.
    """
    run: RunFolder | None = None
    if RUN_FOLDER_VARIABLE in os.environ:
        yield RunFolder(Path(os.environ[RUN_FOLDER_VARIABLE]))  # the launcher's lock
        return
    if resume == "auto":
        run = find_unfinished(runs, resolved.name, resolved.scale)
        if run is None:
            say("nothing to resume: starting a new run")
    elif resume is not None:
        run = _run_to_resume(Path(resume))
    with locked(run or create_run(runs, resolved.name)) as opened:
        if run is not None:
            resolved = with_micro_batch_sizes(resolved, recorded_sizes(run))
            _check_same_recipe(resolved, run)
            point = resume_point(run, say)
            say(f"resuming {run.path} at step {read_state(point)['step'] if point else 0}")
        else:
            opened.write_recipe(recipe_text(resolved))
            say(f"run folder: {opened.path}")
        opened.write_environment()
        for file in opened.path.glob("failure_rank*.json"):
            file.unlink()
        opened.write_status("running", exit_code=None, error=None, recipe=resolved.name, scale=resolved.scale,
                            recipe_hash=resolved.hash)  # fmt: skip
        yield opened


def _run_to_resume(path: Path) -> RunFolder:
    """The run that ``path`` is, or whose last checkpoint it is. Raises CheckpointError, or UsageError for another."""
    wanted = resolve_checkpoint(path)
    run = run_of(wanted)
    point = resume_point(run)
    names_a_checkpoint = (path / STATE_FILE).is_file()
    if names_a_checkpoint and point is not None and read_state(wanted)["step"] != read_state(point)["step"]:
        raise UsageError(
            f"{wanted.name} is not the last checkpoint of {run.path}; to branch off from it start a new run with "
            f"--init-from {wanted}, or remove the later checkpoints to continue from it"
        )
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
    recorded, point = run.status().get("recipe_hash"), resume_point(run)
    if recorded is None and point is not None:  # status.json is damaged
        recorded = read_state(point).get("recipe_hash")
    if recorded in (None, resolved.hash):
        return
    try:
        earlier = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # damaged: what differs cannot be said
        earlier = None
    differing = _differences(earlier, resolved.document) if isinstance(earlier, Mapping) else []
    raise CheckpointError(
        f"{run.path} was started with another recipe: " + ("; ".join(differing[:8]) or "the resolved values differ")
        + ". Set these as they were, or start a new run from its weights with --init-from"
    )  # fmt: skip


def _differences(earlier: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(earlier, Mapping) and isinstance(now, Mapping):
        keys = sorted({*earlier, *now}, key=str)
        return [d for key in keys for d in _differences(earlier.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if earlier == now or not changes_training(path) else [f"{path} was {earlier!r} and is {now!r}"]


def recipe_text(resolved: ResolvedRecipe) -> str:
    """The resolved recipe as a file of its own: it can be checked, fitted and validated again."""
    head = f"# The recipe of this run, resolved (scale {resolved.scale}, hash {resolved.hash}).\n"
    return head + to_yaml(resolved.document)
