"""Running the checks."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import lbzoo.testing
from lbzoo.errors import UnknownNameError, UsageError
from lbzoo.testing.check import Check, CheckResult, registered_checks
from lbzoo.testing.example import Example
from lbzoo.testing.subject import Subject


def list_checks(only: str | Sequence[str] | None = None) -> list[Check]:
    """All checks, in the order of their files, or those whose name or topic matches a glob of ``only``.

    Raises UnknownNameError for a glob that matches none.
    """
    for module in pkgutil.iter_modules(lbzoo.testing.__path__):
        if module.name.startswith("checks_"):
            importlib.import_module(f"lbzoo.testing.{module.name}")
    checks = sorted(registered_checks().values(), key=lambda check: check.topic)
    if only is None:
        return checks
    globs = [only] if isinstance(only, str) else only
    for glob in globs:
        if not any(_matches(check, [glob]) for check in checks):
            raise UnknownNameError("check", glob, [check.name for check in checks])
    return [check for check in checks if _matches(check, globs)]


def _matches(check: Check, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(word, glob) for glob in globs for word in (check.name, check.topic))


def check_optimizer(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    *,
    options: Mapping[str, Any] | None = None,
    only: str | Sequence[str] | None = None,
    slow: bool = False,
) -> list[CheckResult]:
    """Whether an optimizer behaves, one result a check.

    ``optimizer`` is a name (``lamb``, ``timm:lamb``, ``torch:AdamW``, ``package.module:Class``, ``./mine.py:Mine``), a
    class or a factory ``f(params, **options)``. ``options`` go to its constructor; its learning rate is 0.1 unless
    they hold one. ``only`` selects checks by globs on names or topics, ``slow`` adds those that take more than seconds.
    The sharding checks start three processes, which later calls use again. Raises UsageError where the optimizer
    cannot be found, or cannot be built with these options.
    """
    return list(iterate_checks(optimizer, options=options, only=only, slow=slow))


def iterate_checks(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    *,
    options: Mapping[str, Any] | None = None,
    only: str | Sequence[str] | None = None,
    slow: bool = False,
) -> Iterator[CheckResult]:
    """The results of :func:`check_optimizer` as they come."""
    checks = list_checks(only)
    subject = Subject.resolve(optimizer, options)
    try:
        subject.build(Example())
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{subject.label} cannot be built: {type(error).__name__}: {error}") from error
    for check in checks:
        if check.slow and not slow:
            yield CheckResult(check.name, "skipped", "slow", 0.0)
        else:
            yield check.run(subject)
