"""``lbzoo.fit`` and ``lbzoo.validate``: from a recipe's name to a finished run folder.

Light to import: torch and Lightning come in with the engine, after every mistake that can be found without them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lbzoo import scaling
from lbzoo.checkpoint.folder import read_state, resolve_checkpoint
from lbzoo.checkpoint.transformers_folder import is_transformers_folder
from lbzoo.data.wordpiece import HasVocabulary, saved_vocabulary
from lbzoo.engines.accelerate_config import check_accelerate
from lbzoo.engines.launch import (
    RUN_FOLDER_VARIABLE,
    World,
    check_launchable,
    check_trainer,
    die_with_parent,
    find_world,
    launch_workers,
)
from lbzoo.engines.micro_batch_sizes import check_sizes_can_be_found, with_found_sizes
from lbzoo.engines.opening import Say, open_run, resume_point
from lbzoo.engines.run_folder import RunFolder, run_of
from lbzoo.errors import DataError, DivergedError, LbzooError, UsageError
from lbzoo.recipe import ResolvedRecipe, build_data, load_recipe, with_sample_counts
from lbzoo.recipe.schema import Scale

if TYPE_CHECKING:
    from lbzoo.data.base import DataSource
    from lbzoo.engines.stage_run import Outcome

T = TypeVar("T")
Sources = dict[str, "DataSource"]  # by stage; prepared, and listed only once


@dataclass(frozen=True)
class RunResult:
    """How a run ended. ``metrics`` are those of the last validation, ``best`` the best monitored value and its step."""

    run_dir: Path
    state: str
    exit_code: int
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, Any] = field(default_factory=dict)


def fit(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    scale: Scale = "paper",
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    runs: str | Path = "runs",
    allow_plugins: bool = True,
    say: Say = lambda text: None,
) -> RunResult:
    """Train a recipe.

    Args:
        recipe: a path, or the name of a recipe of the zoo.
        overrides: ``key.sub=value`` strings, the strongest layer.
        scale: ``paper``, or ``mini`` (embedded data, small model), or ``smoke`` (two optimizer steps).
        resume: ``"auto"`` (the newest run of this recipe that is not finished, if any), a run folder or a checkpoint.
        init_from: weights to start from: a run folder, a checkpoint, a state dict in a file, or a folder that
            transformers saved. A task that names ``shared_weights`` takes them from another head as well.
        runs: where run folders are made: ``runs/<recipe>/<number>/``.
        allow_plugins: whether the recipe may import code (``plugins``, ``package.module:Class``).
        say: called with each line that a person at a terminal wants to read (rank 0 only).

    Returns the result of a run that finished or was stopped by a signal, and of one whose processes were started by
    this call, however it ended.

    Raises:
        LbzooError: for everything that the user can mend; its ``exit_code`` says which kind.
    """
    resolved = load_recipe(recipe, overrides, scale=scale, allow_plugins=allow_plugins)
    if resume is not None and init_from is not None:
        raise UsageError("--resume continues a run with its own weights; give either it or --init-from")
    world = _world(resolved)
    for note in resolved.notes:
        _say_once(world, say, f"note: {note}")
    weights = _weights_path(init_from)
    if resume is None:
        check_sizes_can_be_found(resolved, world)
    resolved, sources = _check_before_start(resolved, world, say)
    _check_vocabularies(sources, weights)
    if not world.in_process:
        check_launchable(world)
        with open_run(resolved, resume, Path(runs), say) as run:
            say(f"starting {world.devices} processes")
            arguments = _arguments(recipe, overrides, scale, resume, init_from, runs, allow_plugins)
            return _result(run, launch_workers(world, arguments, run, resolved.checkpoint.requeue_signal))
    return _fit_in_process(resolved, sources, world, resume, weights, Path(runs), say)


def validate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    prefer: str = "best",
    allow_plugins: bool = True,
) -> dict[str, float]:
    """The validation metrics of a run's checkpoint (a run folder means its best one), with the run's own recipe."""
    weights = resolve_checkpoint(Path(checkpoint), prefer=prefer)
    run = run_of(weights)
    resolved = load_recipe(run.recipe_file, overrides, allow_plugins=allow_plugins)
    world = _world(resolved)
    if not world.in_process:
        alone = "trainer.devices=1" + (" trainer.num_nodes=1" if world.num_nodes > 1 else "")
        raise UsageError(
            f"validate runs in one process here: add {alone}, or start it with\n  torchrun "
            f"--nproc-per-node={world.devices} -m lbzoo validate {checkpoint}"
        )
    source = build_data(resolved.stages[-1])
    source.prepare()
    from lbzoo.engines import distributed
    from lbzoo.engines.stages import evaluate

    with distributed.process_group(world, also_alone=resolved.trainer.strategy == "fsdp"):
        return evaluate(resolved, source, world, weights)


def _fit_in_process(
    resolved: ResolvedRecipe,
    sources: Sources,
    world: World,
    resume: str | Path | None,
    weights: Path | None,
    runs: Path,
    say: Say,
) -> RunResult:
    if RUN_FOLDER_VARIABLE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)  # a killed agent leaves nobody behind
    from lbzoo.engines import distributed
    from lbzoo.engines.signals import StopRequested
    from lbzoo.engines.stage_run import Start
    from lbzoo.engines.stages import train

    quiet: Say = say if world.rank == 0 else lambda text: None
    settings = resolved.trainer
    with (
        distributed.process_group(world, also_alone=settings.strategy == "fsdp", timeout=settings.timeout),
        ExitStack() as held,
    ):
        opened = open_run(resolved, resume, runs, quiet)
        run = RunFolder(distributed.on_rank_zero(lambda: held.enter_context(opened).path))
        checkpoint = distributed.on_rank_zero(lambda: resume_point(run) if resume is not None else None)
        state = read_state(checkpoint) if checkpoint else None
        if state is not None:
            _say_other_devices(resolved, state, world, quiet)
        start = Start(checkpoint, state, weights)

        def find_sizes_and_train() -> Outcome:
            return train(with_found_sizes(resolved, sources, world, run, quiet), sources, world, run, start)

        try:
            outcome = _guarded(run, world, settings.timeout, find_sizes_and_train)
        except StopRequested as stop:
            return _result(run, stop.exit_code)
    if world.rank == 0:
        best = {"monitor": outcome.best.monitor, "value": outcome.best.value, "step": outcome.best.step}
        run.write_status("finished", exit_code=0, step=outcome.step, metrics=outcome.metrics, best=best)
    return _result(run, 0)


def _say_other_devices(resolved: ResolvedRecipe, state: Mapping[str, Any], world: World, say: Say) -> None:
    """A run that goes on on other devices than it was saved on keeps its global batch."""
    before = int(state.get("world_size", world.world_size))
    if before == world.world_size:
        return
    stage = resolved.stages[int(state["stage_index"])]
    size, micro, devices = stage.global_batch_size, stage.micro_batch_size, world.world_size
    say(f"saved on {before} devices, goes on on {devices}: the global batch stays {size:,} = {micro:,} x {devices} "
        f"devices x {size // (micro * devices):,} accumulated")  # fmt: skip


def _guarded(run: RunFolder, world: World, timeout: float, train: Callable[[], Outcome]) -> Outcome:
    """Run the training and write into the run folder how it ended, whatever happens."""
    from lbzoo.engines.distributed import lost_rank
    from lbzoo.engines.signals import StopRequested

    def failed(error: BaseException, exit_code: int, state: Any = "failed") -> None:
        with suppress(LbzooError):  # a full disk: the error that is on its way says more
            if world.rank == 0:
                run.write_status(state, exit_code=exit_code, error=str(error))
            elif state == "failed":
                run.write_rank_failure(world.rank, error, exit_code)

    try:
        return train()
    except StopRequested as stop:
        failed(stop, stop.exit_code, "interrupted")
        raise
    except KeyboardInterrupt as stop:
        failed(stop, 130, "interrupted")
        raise
    except LbzooError as error:
        failed(error, error.exit_code, "diverged" if isinstance(error, DivergedError) else "failed")
        raise
    except BaseException as error:
        lost = lost_rank(error, timeout)
        failed(lost or error, 1)
        if lost is not None:
            raise lost from error
        raise


def _world(resolved: ResolvedRecipe) -> World:
    settings = resolved.trainer
    world = find_world(accelerator=settings.accelerator, devices=settings.devices, num_nodes=settings.num_nodes)
    check_trainer(settings, world)
    check_accelerate(settings, on_gpu=world.accelerator == "cuda")
    return world


def _check_before_start(resolved: ResolvedRecipe, world: World, say: Say) -> tuple[ResolvedRecipe, Sources]:
    """Everything that would go wrong later and can be seen now; steps are counted with the samples that are there."""
    counts: dict[str, int] = {}
    sources: Sources = {}
    for stage in resolved.stages:
        source = sources[stage.name] = build_data(stage)
        try:
            source.prepare()
        except DataError as error:
            if resolved.scale == "paper":
                raise type(error)(f"{error}\nTo try the recipe on embedded data instead: --scale mini") from None
            raise
        found = source.facts().num_train
        if found != stage.num_train:
            counts[stage.name] = found
            _say_once(world, say, f"note: {stage.data.name} has {found:,} training samples here, not the usual "
                      f"{stage.num_train:,}: epochs are counted with these")  # fmt: skip
    resolved = with_sample_counts(resolved, counts) if counts else resolved
    for stage in resolved.stages:
        scaling.accumulation(
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            world_size=world.world_size,
        )
    return resolved, sources


def _check_vocabularies(sources: Sources, weights: Path | None) -> None:
    """In the weights that a stage starts from, an id means the token that it meant where they were trained."""
    known = [(name, source.vocabulary) for name, source in sources.items() if isinstance(source, HasVocabulary)]
    for (before, theirs), (name, vocabulary) in pairwise(known):
        if difference := theirs.difference(vocabulary):
            raise DataError(
                f"stage '{name}' starts from the weights of stage '{before}', but has another vocabulary: {difference}"
            )

    if known and weights is not None and _vocabulary_of(weights) not in (None, known[0][1].digest):
        raise DataError(
            f"{weights} was trained with another vocabulary than stage '{known[0][0]}' has, in which its ids "
            "mean other tokens; give the data the vocabulary that it was trained with"
        )


def _vocabulary_of(weights: Path) -> str | None:
    """The digest of the vocabulary that goes with weights, as far as they say."""
    if weights.is_file():
        return None
    if is_transformers_folder(weights):
        vocabulary = saved_vocabulary(weights)
        return vocabulary.digest if vocabulary is not None else None
    return read_state(weights).get("vocabulary")


def _weights_path(init_from: str | Path | None) -> Path | None:
    if init_from is None:
        return None
    path = Path(init_from)
    return path if path.is_file() else resolve_checkpoint(path, prefer="best")


def _result(run: RunFolder, exit_code: int) -> RunResult:
    status = run.status()
    return RunResult(
        run.path,
        str(status.get("state", "failed")),
        exit_code,
        int(status.get("step") or 0),
        status.get("metrics") or {},
        status.get("best") or {},
    )


def _arguments(
    recipe: str | Path,
    overrides: Sequence[str],
    scale: Scale,
    resume: str | Path | None,
    init_from: str | Path | None,
    runs: str | Path,
    allow_plugins: bool,
) -> list[str]:
    """The command line of a worker: the one that would have made this call."""
    arguments = ["fit", str(recipe), *overrides, "--scale", scale, "--runs", str(runs)]
    arguments += ["--resume", str(resume)] if resume is not None else []
    arguments += ["--init-from", str(init_from)] if init_from is not None else []
    arguments += [] if allow_plugins else ["--no-plugins"]
    return arguments + (["--debug"] if "--debug" in sys.argv else [])


def _say_once(world: World, say: Say, text: str) -> None:
    """Where a launcher started several processes, only the first speaks; where lbzoo is the launcher, it does."""
    if world.rank == 0 and RUN_FOLDER_VARIABLE not in os.environ:
        say(text)
