"""Four gloo processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lbzoo.testing.processes import Processes


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Processes]:
    with Processes(4) as processes:
        yield processes
