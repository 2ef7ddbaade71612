"""The model of a run in other people's formats."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lbzoo.checkpoint.folder import read_state, resolve_checkpoint, validates_averages
from lbzoo.data.wordpiece import HasVocabulary
from lbzoo.engines.run_folder import run_of
from lbzoo.errors import DataError, UsageError
from lbzoo.recipe import Stage, build_data, load_recipe

Format = Literal["transformers"]


def export(
    checkpoint: str | Path,
    to: Path,
    *,
    form: Format = "transformers",
    prefer: str = "best",
    allow_plugins: bool = True,
) -> list[str]:
    """Write the model of a run's checkpoint (a run folder means its best one) to the folder ``to``.

    Averages of the weights are exported where the run validates with them. Returns notes for the user. Raises
    UsageError where the folder is not empty, or where the task is on no model of this form.
    """
    path = resolve_checkpoint(Path(checkpoint), prefer=prefer)
    run = run_of(path)
    resolved = load_recipe(run.recipe_file, allow_plugins=allow_plugins)
    stage = resolved.stages[int(read_state(path)["stage_index"])]
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"'{to}' exists already and is not overwritten; give another name")
    from lbzoo.checkpoint import load_weights
    from lbzoo.recipe import build_task

    task = build_task(stage)
    save = getattr(task, f"save_{form}", None)
    if save is None:
        raise UsageError(f"task '{stage.task.name}' is on no model of {form}, and cannot be exported to it")
    load_weights(path, task, averaged=validates_averages(path))
    to.mkdir(parents=True, exist_ok=True)
    save(to)
    return _save_vocabulary(stage, to)


def _save_vocabulary(stage: Stage, to: Path) -> list[str]:
    """The tokenizer, where the data has one and its files are here; a note where they are not."""
    source = build_data(stage)
    if not isinstance(source, HasVocabulary):
        return []
    try:
        source.vocabulary.save_tokenizer(to)
    except DataError as error:
        return [f"without a tokenizer: {str(error).splitlines()[0]}"]
    return []
