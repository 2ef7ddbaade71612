"""``lbzoo sweep``: trials of a recipe, n at a time, each a run of its own, resumable at the trial and inside it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbzoo.engines.launch import die_with_parent
from lbzoo.engines.run_folder import RunFolder, write_json
from lbzoo.errors import UsageError
from lbzoo.recipe import ResolvedRecipe, load_recipe
from lbzoo.recipe.components import component_class
from lbzoo.recipe.schema import Scale
from lbzoo.tables.sweep_space import Arm, Point, parse_arms
from lbzoo.tables.sweep_study import ArmStudy, Ending, Mode, Trial, locked

if TYPE_CHECKING:
    import optuna

Say = Callable[[str], None]
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Sweep:
    """What is swept: the recipe, the arms and their points, and the metric that trials are judged by."""

    recipe: Path
    name: str
    scale: Scale
    arms: tuple[Arm, ...]
    points: tuple[tuple[Point, ...], ...]
    """Of each arm; all arms have as many."""
    metric: str
    mode: Mode
    folder: Path


@dataclass(frozen=True)
class SweepResult:
    """Trials of all arms that ended, and whether some are left."""

    sweep: Sweep
    trials: tuple[Trial, ...]
    interrupted: bool = False

    @property
    def failed(self) -> int:
        return sum(trial.ending == "failed" for trial in self.trials)


def plan_sweep(
    recipe: Path,
    words: Sequence[str],
    *,
    trials: int | None = None,
    seed: int = 0,
    scale: Scale = "paper",
    metric: str | None = None,
    mode: Mode | None = None,
    name: str | None = None,
    runs: Path = Path("runs"),
) -> Sweep:
    """A sweep, every point of which is a sound recipe. Raises UsageError with the first that is not.

    ``trials`` is of each arm. ``metric`` and ``mode``: by default what the task itself monitors. The same arguments
    give the same folder, so that the same command goes on with its sweep; more ``trials`` extend it, but for the whole
    of a grid, which is another sweep than a part of it.
    """
    arms = parse_arms(words)
    budget = trials
    if budget is None and len({arm.grid_size for arm in arms}) > 1:
        raise UsageError("the optimizers' grids differ in size; give all the same number of points with --trials")
    points = tuple(tuple(arm.points(budget, seed)) for arm in arms)
    if len({len(each) for each in points}) > 1:
        raise UsageError("the optimizers' grids have not as many points as --trials asks for; budgets would differ")
    loaded = [
        load_recipe(recipe, [*arm.overrides, *_overrides(point)], scale)
        for arm, of_arm in zip(arms, points, strict=True)
        for point in of_arm
    ]
    found_metric, found_mode = _metric(loaded[0], metric, mode)
    # The points of a grid that is tried in part are drawn from it, and stand in another order than all of them.
    in_part = any(len(each) < (arm.grid_size or 0) for arm, each in zip(arms, points, strict=True))
    digest = _digest(recipe, arms, scale, seed, found_metric, in_part=in_part)
    folder = runs / "sweeps" / (name or f"{recipe.stem}-{digest}")
    sweep = Sweep(recipe, recipe.stem, scale, tuple(arms), points, found_metric, found_mode, folder)
    _check_folder(sweep, digest, words, seed)
    return sweep


def run_sweep(sweep: Sweep, *, jobs: int = 1, say: Say = lambda text: None) -> SweepResult:
    """Run the trials that have no result yet, ``jobs`` at a time."""
    with locked(sweep.folder):
        studies = [
            ArmStudy(sweep.folder, arm, points, sweep.mode)
            for arm, points in zip(sweep.arms, sweep.points, strict=True)
        ]
        # Arm after arm at each point: what is cut short has compared all of them over the same points.
        left = sorted((point, index) for index, study in enumerate(studies) for point in study.remaining())
        total = sum(len(points) for points in sweep.points)
        say(f"{sweep.folder}: {total - len(left)} of {total} trials done")
        interrupted = _Scheduler(sweep, studies, jobs, say).run(left)
        return SweepResult(sweep, tuple(trial for study in studies for trial in study.trials()), interrupted)


@dataclass
class _Running:
    study: ArmStudy
    trial: optuna.Trial
    point: int
    slot: int
    process: subprocess.Popen[bytes]
    folder: Path
    began: float = field(default_factory=time.monotonic)


class _Scheduler:
    """One thread that starts processes, waits for them and writes down what they came to."""

    def __init__(self, sweep: Sweep, studies: Sequence[ArmStudy], jobs: int, say: Say) -> None:
        self.sweep = sweep
        self.studies = studies
        self.jobs = jobs
        self.say = say
        self.running: list[_Running] = []
        self.stopping = False

    def run(self, left: Sequence[tuple[int, int]]) -> bool:
        """Returns whether a signal cut it short."""
        waiting = list(left)
        with self._signals():
            while self.running or (waiting and not self.stopping):
                while waiting and len(self.running) < self.jobs and not self.stopping:
                    point, index = waiting.pop(0)
                    self._start(self.studies[index], point)
                self._collect()
                time.sleep(_POLL_SECONDS)
        return self.stopping

    def _start(self, study: ArmStudy, point: int) -> None:
        slot = min(set(range(self.jobs)) - {each.slot for each in self.running})
        folder = self.sweep.folder / "trials" / f"{study.arm.name.replace(':', '.')}-{point:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        overrides = [*study.arm.overrides, *_overrides(study.points[point])]
        trial = study.begin(point)
        with (folder / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                fit_command(self.sweep, overrides, folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(slot, self.jobs),
                start_new_session=True,  # a Ctrl-C reaches the trials once, through this process
                preexec_fn=_end_with_the_sweep,
            )
        self.running.append(_Running(study, trial, point, slot, process, folder))

    def _collect(self) -> None:
        for each in list(self.running):
            if each.process.poll() is None:
                continue
            self.running.remove(each)
            ended = _ended(self.sweep, each)
            each.study.end(each.trial, ended)
            said = f"{self.sweep.metric} {ended.value:.5g}" if ended.value is not None else ended.error or ""
            words = " ".join(_overrides(ended.values))
            self.say(f"[{each.point + 1}/{len(each.study.points)}] {ended.arm} {words}: {ended.ending} {said}".rstrip())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM let the trials save a checkpoint and leave; the same command goes on from there."""

        def stop(signum: int, frame: Any) -> None:
            self.stopping = True
            for each in self.running:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(each.process.pid, signal.SIGTERM)

        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def fit_command(sweep: Sweep, overrides: Sequence[str], folder: Path) -> list[str]:
    """The process of a trial; it goes on with the trial's run where there is one that was cut short."""
    words = ["--scale", sweep.scale, "--runs", str(folder), "--resume", "auto"]
    return [sys.executable, "-m", "lbzoo", "fit", str(sweep.recipe), *overrides, *words]


def _ended(sweep: Sweep, each: _Running) -> Trial:
    """What the trial's run folder says of it."""
    values = each.study.points[each.point]
    folders = sorted(each.folder.glob("*/*/status.json"), key=lambda file: file.stat().st_mtime)
    run = RunFolder(folders[-1].parent) if folders else None
    status = run.status() if run is not None else {}
    ending, value, error = _outcome(sweep, each.process.returncode, status)
    if ending == "failed" and not error:
        error = _last_line(each.folder / "output.txt")
    path = str(run.path) if run is not None else None
    seconds = round(time.monotonic() - each.began, 1)
    return Trial(each.study.arm.name, each.point, values, ending, value, seconds, path, error)


def _outcome(sweep: Sweep, exit_code: int, status: dict[str, Any]) -> tuple[Ending, float | None, str | None]:
    metrics = status.get("metrics") or {}
    if exit_code == 0 and sweep.metric in metrics:
        return "finished", float(metrics[sweep.metric]), None
    if exit_code == 0:
        return "failed", None, f"the run logs no {sweep.metric}; it logs {', '.join(metrics) or 'nothing'}"
    if exit_code == 3:
        return "diverged", None, status.get("error")
    if exit_code > 128 or exit_code < 0:
        return "interrupted", None, None
    return "failed", None, status.get("error")


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _overrides(point: Point) -> list[str]:
    return [f"{key}={value}" for key, value in point.items()]


def _metric(recipe: ResolvedRecipe, metric: str | None, mode: Mode | None) -> tuple[str, Mode]:
    task = component_class("task", recipe.stages[-1].task.name)
    monitor, natural = str(task.monitor), task.mode
    if metric is None or metric == monitor:
        return monitor, mode or natural
    if mode is None:
        raise UsageError(f"say whether {metric} is better high or low: --mode max or --mode min")
    return metric, mode


def _digest(recipe: Path, arms: Sequence[Arm], scale: Scale, seed: int, metric: str, *, in_part: bool) -> str:
    """Of everything that makes point number n what it is: the recipe as it is now, what varies and how."""
    facts: tuple[Any, ...] = (load_recipe(recipe, (), scale).hash, arms, scale, seed, metric)
    return hashlib.sha256(repr((*facts, "in part") if in_part else facts).encode()).hexdigest()[:8]


def _check_folder(sweep: Sweep, digest: str, words: Sequence[str], seed: int) -> None:
    """A folder holds one sweep; what it is stands in ``sweep.json``."""
    file = sweep.folder / "sweep.json"
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["digest"] != digest:
            raise UsageError(
                f"{sweep.folder} holds another sweep ({earlier['recipe']} {' '.join(earlier['words'])}, or the recipe "
                f"has changed since, or one of the two takes a grid in part); give this one another --name"
            )
        return
    sweep.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "digest": digest,
        "recipe": str(sweep.recipe),
        "words": list(words),
        "scale": sweep.scale,
        "seed": seed,
        "metric": sweep.metric,
        "mode": sweep.mode,
    }
    write_json(file, content)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """The trial's share of the machine: threads, and GPUs where there are several."""
    environment = dict(os.environ)
    if jobs == 1:
        return environment
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    gpus = _gpus()
    if gpus:
        own = gpus[slot::jobs] or [gpus[slot % len(gpus)]]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _end_with_the_sweep() -> None:
    die_with_parent(signal.SIGTERM)
