"""The trials of a sweep in Optuna's sqlite storage: what is done, what is left, and what came of it.

Every arm is a study of one file, ``study.db``, which Optuna's own tools (its dashboard, its importances) read as well.
Only the process that holds the sweep's lock writes to it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lbzoo.data.extras import extra
from lbzoo.errors import UsageError
from lbzoo.tables.sweep_space import Arm, Choices, Dimension, Point

if TYPE_CHECKING:
    import optuna

Mode = Literal["max", "min"]
Ending = Literal["finished", "diverged", "failed", "interrupted"]


@dataclass(frozen=True)
class Trial:
    """One point of an arm and what came of it. ``value`` is the metric, where the run finished."""

    arm: str
    point: int
    values: Point
    ending: Ending
    value: float | None = None
    seconds: float | None = None
    run: str | None = None
    error: str | None = None


class ArmStudy:
    """The study of one arm: its points, and which of them are done."""

    def __init__(self, folder: Path, arm: Arm, points: Sequence[Point], mode: Mode) -> None:
        with extra("sweep"):
            import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.arm = arm
        self.points = points
        self._states = optuna.trial.TrialState
        self._distributions = {each.key: _distribution(each) for each in arm.dimensions}
        self._study: optuna.Study = optuna.create_study(
            study_name=arm.name,
            storage=f"sqlite:///{folder / 'study.db'}",
            direction="maximize" if mode == "max" else "minimize",
            load_if_exists=True,
        )
        self._end_lost_trials()

    def trials(self) -> list[Trial]:
        """The last trial of each point that was begun and ended, in the order of the points."""
        found = {}
        for each in self._study.get_trials(deepcopy=False):
            said: Mapping[str, Any] = each.user_attrs
            if each.state.is_finished() and "point" in said:
                found[said["point"]] = Trial(
                    self.arm.name,
                    said["point"],
                    self.points[said["point"]] if said["point"] < len(self.points) else said["values"],
                    said.get("ending", "interrupted"),
                    each.value if each.state == self._states.COMPLETE else None,
                    said.get("seconds"),
                    said.get("run"),
                    said.get("error"),
                )
        return [found[point] for point in sorted(found)]

    def remaining(self) -> list[int]:
        """Points without a result; divergence is one, a failure is tried again."""
        done = {trial.point for trial in self.trials() if trial.ending in ("finished", "diverged")}
        return [point for point in range(len(self.points)) if point not in done]

    def begin(self, point: int) -> optuna.Trial:
        values = self.points[point]
        self._study.enqueue_trial(
            {each.key: _as_parameter(each, values[each.key]) for each in self.arm.dimensions},
            user_attrs={"point": point, "values": dict(values)},
        )
        return self._study.ask(self._distributions)

    def end(self, trial: optuna.Trial, ended: Trial) -> None:
        for key in ("ending", "seconds", "run", "error"):
            trial.set_user_attr(key, getattr(ended, key))
        if ended.value is not None:
            self._study.tell(trial, ended.value)
        else:
            self._study.tell(trial, state=self._states.FAIL)

    def _end_lost_trials(self) -> None:
        """Trials whose process was killed along with the sweep's."""
        for each in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING, self._states.WAITING)):
            self._study.tell(each.number, state=self._states.FAIL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the sweep's folder; another process that sweeps there is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"this sweep is running already, in another process ({folder})") from None
        file.write(str(os.getpid()))
        file.flush()
        yield


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.values)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _as_parameter(dimension: Dimension, text: str) -> str | int | float:
    if isinstance(dimension, Choices):
        return text
    return int(text) if dimension.whole else float(text)
