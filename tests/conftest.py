"""Shared by every test: no network back-end lookups, one thread a process, a clean working folder on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test run started by a launcher of its own must not make the code under test believe that it was launched.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LBZOO_RUN_FOLDER"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def leave_no_trace() -> Iterator[None]:
    """Tests share a process: names registered by a user's file, and accelerate's state, end with the test."""
    from lbzoo.registry import optimizers

    before = dict(optimizers._added)
    yield
    for name, added in list(optimizers._added.items()):
        if name not in before and not added.component.__module__.startswith("lbzoo."):
            del optimizers._added[name]
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
