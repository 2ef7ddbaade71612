"""Learning-rate schedules: what the learning rate is multiplied by at each optimizer step.

Steps count from 1, as in the papers: a schedule of T steps is a function of t = 1..T. It warms up linearly, t/W for
t <= W, and then follows a shape. The shapes are the functions registered below; each gets the :class:`Phases` of the
run and returns the multiplier at step t after the warmup.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lbzoo.errors import UsageError, did_you_mean
from lbzoo.registry import register_schedule, schedules
from lbzoo.signatures import REQUIRED, options_of

Shape = Callable[[int], float]
DecayFrom = Literal["peak", "start"]


@dataclass(frozen=True)
class Phases:
    """How a run's optimizer steps divide: linear warmup, a constant stretch at the peak, and the rest.

    ``steps_per_epoch`` need not be whole.
    """

    steps: int
    steps_per_epoch: float
    warmup_steps: int = 0
    constant_steps: int = 0

    def progress(self, t: int, decay_from: DecayFrom = "peak") -> float:
        """The part of the decay that is done at step t, 1 at the last step.

        It starts where the warmup and the constant stretch end (``peak``, LANS eqs. 8 and 9), or at step 0
        (``start``, the formula of LAMB section 4 read literally: the rate jumps down after the warmup).
        """
        start = self.warmup_steps + self.constant_steps if decay_from == "peak" else 0
        return (t - start) / (self.steps - start) if t > start else 0.0


@dataclass(frozen=True)
class Schedule:
    """The learning-rate multiplier as a function of the optimizer step, ``schedule(t)`` for t = 1..``steps``."""

    name: str
    phases: Phases
    shape: Shape

    def __call__(self, t: int) -> float:
        """The multiplier at step t; a t beyond the last step gets the last step's, since schedulers look one ahead."""
        if t < 1:
            raise ValueError(f"optimizer steps count from 1, got {t}")
        t = min(t, self.steps)
        return t / self.warmup_steps if t <= self.warmup_steps else self.shape(t)

    @property
    def steps(self) -> int:
        return self.phases.steps

    @property
    def warmup_steps(self) -> int:
        return self.phases.warmup_steps

    @property
    def constant_steps(self) -> int:
        return self.phases.constant_steps

    def describe(self) -> str:
        """One line for people: ``1501 steps of warmup, 962 constant, 1056 of warmup_constant_linear``."""
        rest = self.steps - self.warmup_steps - self.constant_steps
        parts = [f"{self.warmup_steps} steps of warmup"] if self.warmup_steps else []
        parts += [f"{self.constant_steps} constant"] if self.constant_steps else []
        parts += [f"{rest} of {self.name}"] if rest else []
        return ", ".join(parts)


@register_schedule("constant", stepwise=True)
def constant(phases: Phases) -> Shape:
    """The peak learning rate to the end."""
    return lambda t: 1.0


@register_schedule("polynomial")
def polynomial(
    phases: Phases,
    *,
    power: float = 1.0,
    begin: float = 1.0,
    end: float = 0.0,
    decay_from: Literal["peak", "start"] = "peak",
) -> Shape:
    """Decay by (1 - progress)^power, to ``end`` times the peak: 1 is linear (LAMB), 2 quadratic (NovoGrad's SGD).

    A decay that goes through two stages ends the first one at an ``end`` that the second has as its ``begin``.
    """
    if power <= 0:
        raise UsageError(f"schedule polynomial: power must be above 0, got {power}")
    _check_decay("polynomial", phases, end, decay_from)
    if not end <= begin <= 1:
        raise UsageError(f"schedule polynomial: begin is a part of the peak learning rate, {end:g} to 1, got {begin}")
    if begin < 1 and phases.warmup_steps + phases.constant_steps:
        raise UsageError("schedule polynomial: a stage that begins below the peak has no warmup and no constant_*")
    return lambda t: end + (begin - end) * (1 - phases.progress(t, decay_from)) ** power


@register_schedule("cosine")
def cosine(phases: Phases, *, end: float = 0.0, decay_from: Literal["peak", "start"] = "peak") -> Shape:
    """Decay along half a cosine, to ``end`` times the peak."""
    _check_decay("cosine", phases, end, decay_from)
    return lambda t: end + (1 - end) * 0.5 * (1 + math.cos(math.pi * phases.progress(t, decay_from)))


@register_schedule("multistep", stepwise=True)
def multistep(phases: Phases, *, milestones: list[float], factor: float = 0.1) -> Shape:
    """Multiply by ``factor`` after each of the ``milestones``, in epochs from the start (Goyal et al. 2017)."""
    if not milestones or list(milestones) != sorted(set(milestones)) or milestones[0] <= 0:
        raise UsageError(f"schedule multistep: milestones must be rising epochs above 0, got {list(milestones)}")
    boundaries = [_nearest(epoch * phases.steps_per_epoch) for epoch in milestones]
    if boundaries[0] < phases.warmup_steps:
        raise UsageError(
            f"schedule multistep: the milestone at epoch {milestones[0]:g} (step {boundaries[0]}) lies inside the "
            f"warmup of {phases.warmup_steps} steps; shorten the warmup or move the milestone"
        )
    return lambda t: float(factor ** sum(t > boundary for boundary in boundaries))


@register_schedule("warmup_constant_linear")
def warmup_constant_linear(phases: Phases) -> Shape:
    """Linear warmup, a constant stretch at the peak, linear decay to 0 (LANS eq. 9; eq. 8 without the stretch)."""
    return polynomial(phases)


def build_schedule(
    name: str,
    *,
    steps: int,
    steps_per_epoch: float,
    warmup_steps: int | None = None,
    warmup_epochs: float | None = None,
    warmup_ratio: float | None = None,
    constant_steps: int | None = None,
    constant_epochs: float | None = None,
    constant_ratio: float | None = None,
    **shape_options: Any,
) -> Schedule:
    """The schedule registered as ``name`` over ``steps`` optimizer steps.

    Warmup and constant stretch are given each in one unit: optimizer steps, epochs, or a ratio of ``steps``; they are
    rounded to the nearest step. ``shape_options`` go to the shape. Raises UsageError.
    """
    shape = schedules.get(name)
    if steps < 1:
        raise UsageError(f"schedule {name}: a run needs at least one optimizer step, got {steps}")
    warmup = _length("warmup", steps, steps_per_epoch, warmup_steps, warmup_epochs, warmup_ratio)
    stretch = _length("constant", steps, steps_per_epoch, constant_steps, constant_epochs, constant_ratio)
    if warmup + stretch > steps * (1 + 1e-9):
        both = " and constant stretch are" if stretch else " is"
        raise UsageError(
            f"schedule {name}: warmup{both} longer than the run, {warmup + stretch:g} of {steps} optimizer steps"
        )
    if stretch and schedules.meta(name).get("stepwise"):
        raise UsageError(f"schedule {name}: has no gradual decay that constant_* could put off")
    _check_options(name, shape, shape_options)

    # Rounding both up may overshoot by one where the two fill the run.
    whole_warmup = _nearest(warmup)
    whole_stretch = min(_nearest(stretch), steps - whole_warmup)
    phases = Phases(steps, steps_per_epoch, whole_warmup, whole_stretch)
    return Schedule(name, phases, shape(phases, **shape_options))


def _length(
    what: str, steps: int, per_epoch: float, in_steps: int | None, in_epochs: float | None, ratio: float | None
) -> float:
    """The length of a phase in (fractional) optimizer steps; at most one of the three units may be given."""
    units = {f"{what}_steps": in_steps, f"{what}_epochs": in_epochs, f"{what}_ratio": ratio}
    given = {key: value for key, value in units.items() if value is not None}
    if len(given) > 1:
        raise UsageError(f"schedule: give one of {' and '.join(given)}, not both")
    for key, value in given.items():
        if value < 0:
            raise UsageError(f"schedule: {key} must not be negative, got {value}")
    if ratio is not None:
        if ratio > 1:
            raise UsageError(f"schedule: {what}_ratio is a part of the run, at most 1, got {ratio}")
        return ratio * steps
    if in_epochs is not None:
        return in_epochs * per_epoch
    return float(in_steps or 0)


def _check_options(name: str, shape: Callable[..., Shape], given: dict[str, Any]) -> None:
    known = options_of(shape)
    for option in given:
        if option not in known:
            raise UsageError(f"schedule {name} has no option '{option}'{did_you_mean(option, known)}")
    missing = [option.name for option in known.values() if option.default is REQUIRED and option.name not in given]
    if missing:
        raise UsageError(f"schedule {name} needs the option '{missing[0]}'")


def _check_decay(name: str, phases: Phases, end: float, decay_from: str) -> None:
    if not 0 <= end <= 1:
        raise UsageError(f"schedule {name}: end is a part of the peak learning rate, 0 to 1, got {end}")
    if decay_from not in get_args(DecayFrom):
        raise UsageError(f"schedule {name}: decay_from is 'peak' or 'start', not {decay_from!r}")
    if decay_from == "start" and phases.constant_steps:
        raise UsageError(f"schedule {name}: after a constant stretch the decay is from the peak, not from the start")


def _nearest(x: float) -> int:
    """The nearest whole number; a half goes up (round() would take it to the even neighbour)."""
    return math.floor(x + 0.5)
