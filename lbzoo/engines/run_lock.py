"""One run a folder: two that train in the same one would write each other's checkpoints and logs."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import LbzooError, UsageError


@contextmanager
def locked(run: RunFolder) -> Iterator[RunFolder]:
    """Hold the folder for this process, until it ends in whatever way. Raises UsageError where another one has it.

    A POSIX lock: not inherited by loader processes, which outlive a killed run for seconds, and known to file servers.
    On a file system without locks nobody looks.
    """
    try:
        file = (run.path / "lock").open("a")
    except OSError as error:
        raise LbzooError(f"cannot write {run.path / 'lock'}: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            pid, host = (run.status().get(key) for key in ("pid", "host"))
            raise UsageError(
                f"{run.path} is being trained by process {pid} on {host}: wait for it or stop it, or start a run of "
                "its own, without --resume"
            ) from error
        except OSError:  # no locks here
            pass
        yield run
