"""The kit against optimizers with a known fault: each is caught by the check that names it, and by no other.

A check that cannot fail says nothing, so every check must have a saboteur of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from saboteurs import CAUGHT_BY, SABOTEURS, Honest

from lbzoo.testing import CheckResult, check_optimizer, list_checks

WITH_PROCESSES = {check.name for check in list_checks("sharding")}
SLOW = {check.name for check in list_checks() if check.slow}
ONE_PROCESS = [check.name for check in list_checks() if check.name not in WITH_PROCESSES]


def failures(optimizer: Callable[..., Any], **selection: Any) -> dict[str, str]:
    """Name and reason of the checks that fail."""
    results: list[CheckResult] = check_optimizer(optimizer, **selection)
    return {result.name: result.reason for result in results if result.status == "failed"}


def saboteur(name: str) -> Callable[..., Any]:
    """The class, or for a saboteur in lower case the local function that only this process has."""
    return SABOTEURS[name]() if name.islower() else SABOTEURS[name]


def test_every_check_has_a_saboteur():
    assert {check.name for check in list_checks()} == {name for checks in CAUGHT_BY.values() for name in checks}


def test_honest_optimizer_passes_in_one_process():
    results = check_optimizer(Honest, only=ONE_PROCESS)
    assert [result for result in results if result.status == "failed"] == []
    skipped = {result.name for result in results if result.status == "skipped"}
    assert skipped == {"fused_equals_plain", *SLOW}, "it is meant to be put to everything else"


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_caught_by_its_check_alone(name):
    """In one process; the checks on several, and the slow ones, are below."""
    expected = {check for check in CAUGHT_BY[name] if check not in WITH_PROCESSES | SLOW}
    assert failures(saboteur(name), only=ONE_PROCESS).keys() == expected


SHARDING = [name for name, checks in CAUGHT_BY.items() if checks[0] in WITH_PROCESSES]
COMPILING = [name for name, checks in CAUGHT_BY.items() if set(checks) & SLOW]


@pytest.mark.dist
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("name", ["Honest", *SHARDING])
def test_caught_on_several_processes(name):
    optimizer = Honest if name == "Honest" else saboteur(name)
    expected = WITH_PROCESSES & set(CAUGHT_BY.get(name, ()))
    assert failures(optimizer, only="sharding").keys() == expected


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("name", [name for name in CAUGHT_BY if name not in SHARDING])
def test_caught_on_several_processes_too(name):
    expected = WITH_PROCESSES & set(CAUGHT_BY[name])
    assert failures(saboteur(name), only="sharding").keys() == expected


@pytest.mark.parametrize("name", ["Honest", *COMPILING])
def test_caught_by_slow_checks(name):
    optimizer = Honest if name == "Honest" else saboteur(name)
    assert failures(optimizer, only=sorted(SLOW), slow=True).keys() == set(CAUGHT_BY.get(name, ())) & SLOW


def test_reasons_say_what_was_seen():
    assert failures(SABOTEURS["RunsClosureTwice"], only="closure")["closure"] == "the closure was run 2 times in a step"
    written = failures(SABOTEURS["WritesGradients"], only="gradients_untouched")["gradients_untouched"]
    assert written == "step() wrote to the gradient of layers.embedding0.weight"
