"""Several ranks for a test: four gloo processes that the whole session shares, started at the first use.

Starting a process that imports torch costs seconds; a process group between running ones costs milliseconds.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any, TypeVar

from lbzoo.testing.processes import Processes

T = TypeVar("T")

_processes: Processes | None = None


def on_ranks(world_size: int, job: Callable[..., T], *args: Any) -> list[T]:
    """The results of ``job(*args)`` on ``world_size`` (1 to 4) ranks of one process group.

    ``job`` is a function of an importable module, not of the test module that pytest has rewritten.
    """
    global _processes
    if _processes is None:
        _processes = Processes(4)
        atexit.register(_processes.close)
    return _processes.run(world_size, job, *args)
