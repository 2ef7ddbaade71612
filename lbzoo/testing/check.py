"""What a check is, and the register of all of them.

A check is a function of one :class:`~lbzoo.testing.subject.Subject`. It returns where the optimizer is right, raises
:class:`CheckFailure` (by :func:`expect`) or any other exception where it is wrong, and calls :func:`skip` where the
question does not apply. Its docstring says what goes wrong in practice without it, and is shown to whoever fails it::

    @check()
    def gradients_untouched(subject: Subject) -> None:
        \"\"\"Gradient accumulation, clipping and logging read p.grad after the step.\"\"\"
"""

from __future__ import annotations

import inspect
import logging
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch

from lbzoo.errors import UsageError
from lbzoo.testing.subject import Subject

CheckFunction = Callable[[Subject], None]


class CheckFailure(AssertionError):
    """The optimizer does not do what the check asks for; the message says what it does instead."""


class CheckSkipped(Exception):
    """The check does not apply to this optimizer, or cannot run here; the message says why."""


@dataclass(frozen=True)
class CheckResult:
    """What became of one check; ``reason`` is empty for a check that passed."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    reason: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """A registered check. ``topic`` is the subject of its file; ``why`` its docstring, of which users see all."""

    name: str
    topic: str
    why: str
    slow: bool
    function: CheckFunction

    def run(self, subject: Subject) -> CheckResult:
        """Run the check without its warnings and log lines; global random state and gradient mode stay as they are."""
        began = time.perf_counter()
        status: Literal["passed", "failed", "skipped"] = "passed"
        reason = ""
        with _silence(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            try:
                self.function(subject)
            except CheckSkipped as skipped:
                status, reason = "skipped", str(skipped)
            except CheckFailure as failure:
                status, reason = "failed", str(failure)
            except Exception as error:
                status, reason = "failed", f"{type(error).__name__}: {error}"
        return CheckResult(self.name, status, textwrap.shorten(reason, 300), time.perf_counter() - began)


@contextmanager
def _silence() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


_checks: dict[str, Check] = {}


def check(*, slow: bool = False) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function as the check of its own name. ``slow``: only run when asked for."""

    def register(function: CheckFunction) -> CheckFunction:
        name, why = function.__name__, inspect.getdoc(function) or ""
        if not why:
            raise UsageError(f"the check '{name}' has no docstring: say what goes wrong in practice without it")
        if name in _checks:
            raise UsageError(f"there are two checks named '{name}'")
        topic = function.__module__.rpartition(".")[2].removeprefix("checks_")
        _checks[name] = Check(name, topic, why, slow, function)
        return function

    return register


def registered_checks() -> dict[str, Check]:
    """The checks whose modules have been imported, by name."""
    return dict(_checks)


def expect(condition: bool, message: str) -> None:
    """Fail the running check with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckFailure(message)


def skip(reason: str) -> NoReturn:
    """End the running check: it does not apply, and ``reason`` says why."""
    raise CheckSkipped(reason)
