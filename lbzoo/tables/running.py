"""Running the rows of a table, one after another: resumable at the row, and one that fails does not stop the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbzoo.engines.run import RunResult
from lbzoo.engines.run_folder import RunFolder, find_unfinished
from lbzoo.errors import LbzooError, UsageError
from lbzoo.recipe import ResolvedRecipe
from lbzoo.recipe.schema import Scale
from lbzoo.tables.paper_tables import PaperRow
from lbzoo.tables.results import Record, ResultsFile, State, new_record
from lbzoo.tables.row_recipes import RowRecipe, Unavailable, recipe_of

Say = Callable[[str], None]
Fit = Callable[..., RunResult]

# Two steps are a check of the code path; several processes would be another one.
_SMOKE_OVERRIDES = ("trainer.devices=1", "trainer.num_nodes=1")
_SIGNALLED = 128  # exit codes above are of a signal


@dataclass
class Tally:
    """How a call of :func:`run_rows` went."""

    ran: int = 0
    checked: int = 0
    kept: int = 0
    failed: int = 0
    unavailable: int = 0
    interrupted: bool = False

    def __str__(self) -> str:
        counts = {
            "ran": self.ran,
            "checked": self.checked,
            "already there": self.kept,
            "failed": self.failed,
            "cannot be run": self.unavailable,
        }
        text = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to run"
        return f"interrupted; {text}" if self.interrupted else text


@dataclass(frozen=True)
class _Job:
    recipe: RowRecipe
    seed: int
    suffix: str
    """Of the run folder's name: a seed that is not the recipe's own has a folder of its own."""
    resolved: ResolvedRecipe
    """With the overrides, as it will train."""
    overrides: tuple[str, ...]


def run_rows(
    rows: Iterable[PaperRow],
    scale: Scale,
    *,
    runs: Path,
    overrides: Sequence[str] = (),
    repeats: int = 1,
    again: bool = False,
    say: Say = lambda text: None,
    fit: Fit | None = None,
) -> Tally:
    """Run rows at a scale and write what comes of it beside the runs (``results.ResultsFile``).

    A row that has a result with the recipe as it is now is not run again, unless ``again``; one that was interrupted
    goes on where it stopped. At scale ``smoke`` only one of the rows whose recipes differ in numbers alone is run; the
    others are checked. ``repeats``: runs of each row, with seeds that count up from the recipe's. ``overrides`` are
    for what does not change the training, such as ``trainer.devices`` and ``data.root``; others raise UsageError.
    """
    _refuse_ranks()
    runner = _Runner(scale, runs, overrides, again, say, fit or _engine_fit())
    rows = list(rows)
    for position, row in enumerate(rows, 1):
        recipe = recipe_of(row)
        where = f"[{position}/{len(rows)}] {row.table} {row.label}"
        if isinstance(recipe, Unavailable):
            runner.tally.unavailable += 1
            say(f"{where}: {recipe.reason}")
            continue
        runner.run_row(recipe, where, 1 if scale == "smoke" else repeats)
        if runner.tally.interrupted:
            break
    return runner.tally


def _refuse_ranks() -> None:
    """Several processes that each run the table would write over one another."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UsageError(
            "this is one of several processes of a launcher; each would run the table. On one machine start it once: "
            "it starts the processes of a row itself. On several, train a row: torchrun ... -m lbzoo fit lamb/5 --row 2"
        )


def shape_of(recipe: ResolvedRecipe) -> Any:
    """All of a recipe but its numbers: recipes of the same shape run the same code."""
    stages = tuple(
        (
            *((each.name, _shape(each.options)) for each in (stage.task, stage.data, stage.optimizer)),
            _shape(list(stage.param_rules)),
            _shape(stage.schedule.model_dump(exclude_none=True)),
        )
        for stage in recipe.stages
    )
    callbacks = tuple((each.name, _shape(each.options)) for each in recipe.callbacks)
    return stages, callbacks, recipe.trainer.precision, recipe.trainer.strategy


class _Runner:
    def __init__(self, scale: Scale, runs: Path, overrides: Sequence[str], again: bool, say: Say, fit: Fit) -> None:
        self.scale: Scale = scale
        self.runs = runs
        self.overrides = (*overrides, *_SMOKE_OVERRIDES) if scale == "smoke" else tuple(overrides)
        self.again = again
        self.say = say
        self.fit = fit
        self.tally = Tally()
        self._shapes: dict[Any, str] = {}  # at scale smoke: what ran, by its shape

    def run_row(self, recipe: RowRecipe, where: str, repeats: int) -> None:
        results = ResultsFile(self.runs, recipe.row.table)
        latest = results.latest()
        try:
            first_seed = recipe.load(self.scale).seed
            jobs = [self._job(recipe, first_seed, repeat) for repeat in range(repeats)]
        except UsageError as error:
            self.tally.failed += 1
            self.say(f"{where}: failed: {error}")
            return
        for job in jobs:
            last = latest.get((recipe.row.label, self.scale, job.seed))
            at = f"{where} (seed {job.seed})" if repeats > 1 else where
            if last is not None and last.recipe_hash == job.resolved.hash and self._stands(last, at, job):
                continue
            self._run(job, results, at, last)
            if self.tally.interrupted:
                return

    def _job(self, recipe: RowRecipe, first_seed: int, repeat: int) -> _Job:
        """Raises UsageError where the overrides would train something else than the row."""
        seed = first_seed + repeat
        overrides = (f"seed={seed}", *self.overrides)
        plain = recipe.load(self.scale, overrides[:1])
        resolved = recipe.load(self.scale, overrides) if self.overrides else plain
        if resolved.hash != plain.hash:
            row = recipe.row
            raise UsageError(
                f"{' '.join(self.overrides)} changes what is trained, so the result would not be the row's; train it "
                f"apart with: lbzoo fit {row.table} --row {row.number} {' '.join(self.overrides)}"
            )
        return _Job(recipe, seed, f"-seed{seed}" if repeat else "", resolved, overrides)

    def _stands(self, last: Record, where: str, job: _Job) -> bool:
        """Whether there is nothing to do, since the row's result is there or on its way."""
        if last.standing == "running":
            self.say(f"{where}: is running already (process {last.pid} on {last.host})")
        elif last.standing in ("finished", "diverged") and not self.again:
            self.say(f"{where}: {last.standing} already")
            self._shapes.setdefault(shape_of(job.resolved), f"{last.table} {last.row}")
        else:
            return False
        self.tally.kept += 1
        return True

    def _run(self, job: _Job, results: ResultsFile, where: str, last: Record | None) -> None:
        row = job.recipe.row
        record = new_record(row, self.scale, seed=job.seed, recipe=job.recipe.name, recipe_hash=job.resolved.hash)
        shape = shape_of(job.resolved)
        if self.scale == "smoke" and shape in self._shapes:
            results.append(replace(record, state="finished", checked_with=self._shapes[shape]))
            self.tally.checked += 1
            self.say(f"{where}: in order; differs from {self._shapes[shape]} in numbers alone")
            return
        results.append(record)
        self.say(f"{where}: {job.recipe.name} at scale {self.scale}")
        began = time.monotonic()
        ended = replace(self._train(job, results, record, last), seconds=round(time.monotonic() - began, 1))
        results.append(ended)
        self._count(ended, where)
        if ended.state == "finished":
            self._shapes.setdefault(shape, f"{row.table} {row.label}")

    def _train(self, job: _Job, results: ResultsFile, record: Record, last: Record | None) -> Record:
        """The record of the run's end, whatever the end is."""
        file = job.recipe.write(results.folder / "rows", job.suffix)
        try:
            result = self.fit(
                file,
                job.overrides,
                scale=self.scale,
                resume=self._unfinished(job, results.folder, last),
                runs=results.folder,
                say=self.say,
            )
        except LbzooError as error:
            # An error before the first step leaves no run folder that would say more.
            state: State = "diverged" if error.exit_code == 3 else "failed"
            return replace(record, state=state, error=str(error))
        except KeyboardInterrupt:
            return replace(record, state="interrupted")
        except Exception as error:  # a defect in one row's recipe is no reason to lose the others
            return replace(record, state="failed", error=f"{type(error).__name__}: {error}")
        state = _state_of(result)
        metrics = {name: float(value) for name, value in result.metrics.items()}
        # Of the samples that were found; all else of a row's hash is settled before it starts.
        trained = RunFolder(Path(result.run_dir)).status().get("recipe_hash", record.recipe_hash)
        return replace(
            record,
            state=state,
            run=str(result.run_dir),
            step=result.step,
            metrics=metrics,
            other_samples=trained != record.recipe_hash,
        )

    def _unfinished(self, job: _Job, folder: Path, last: Record | None) -> Path | None:
        """The run to go on with: the row's newest, if it was cut short and was of the recipe as it is now."""
        if last is None or last.standing != "interrupted" or last.recipe_hash != job.resolved.hash:
            return None
        run = find_unfinished(folder, job.recipe.stem + job.suffix, self.scale)
        return run.path if run is not None else None

    def _count(self, record: Record, where: str) -> None:
        if record.state == "interrupted":
            self.tally.interrupted = True
        elif record.state == "failed":
            self.tally.failed += 1
        else:
            self.tally.ran += 1
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        reason = f": {record.error}" if record.error else f": {values}" if values else ""
        self.say(f"{where}: {record.state}{reason}")


def _state_of(result: RunResult) -> State:
    if result.exit_code > _SIGNALLED or result.state == "interrupted":
        return "interrupted"
    if result.state in ("finished", "diverged"):
        return "finished" if result.state == "finished" else "diverged"
    return "failed"


def _shape(value: Any) -> Any:
    """Numbers as ``#``; text, flags and keys as they are."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return "#"
    if isinstance(value, dict):
        return tuple((key, _shape(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        shapes = tuple(_shape(item) for item in value)
        return "#" if set(shapes) == {"#"} else shapes
    return str(value)


def _engine_fit() -> Fit:
    from lbzoo.engines import fit

    return fit
