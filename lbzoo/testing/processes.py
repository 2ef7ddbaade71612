"""A few gloo processes on this machine, started once and used for many jobs.

Starting a process that imports torch costs seconds, a process group between processes that run costs milliseconds. So
the processes live as long as their owner, and every job gets a process group of its own, of the size that it asks for::

    with Processes(3) as processes:
        norms = processes.run(2, job, "lamb", {"lr": 0.1})     # job("lamb", {"lr": 0.1}) on ranks 0 and 1

The processes are children by ``python -c``, not by ``multiprocessing``: those import the caller's main module again,
which a script without an ``if __name__ == "__main__"`` guard does not survive.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_START = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); from {0} import serve; serve(int(sys.argv[1]))"
_GRACE = 5.0  # seconds that the other ranks have to come back after one has failed


class JobError(RuntimeError):
    """A rank raised, died, or did not come back in time. ``rank`` is the first one that did."""

    def __init__(self, rank: int, message: str) -> None:
        self.rank = rank
        super().__init__(f"rank {rank}: {message}")


class Processes:
    """``count`` worker processes, started at the first job. After a job that hung they are replaced."""

    def __init__(self, count: int = 3) -> None:
        self.count = count
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="lbzoo-processes-")
        self._jobs = 0

    def run(self, world_size: int, job: Callable[..., T], *args: Any, timeout: float = 120.0) -> list[T]:
        """The results of ``job(*args)`` on ranks 0 .. world_size - 1, which share a gloo process group.

        ``job`` and ``args`` are pickled: ``job`` must be a function of an importable module. Raises JobError.
        """
        if not 1 <= world_size <= self.count:
            raise ValueError(f"world_size {world_size} of {self.count} processes")
        if not self._workers:
            self._workers = [self._start() for _ in range(self.count)]
        self._jobs += 1
        meeting_point = Path(self._folder.name, f"job-{self._jobs}")
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            # The path comes first: the job may live in a module that was not to be found when the process began.
            connection.send(sys.path)
            connection.send_bytes(pickle.dumps((job, args, rank, world_size, str(meeting_point), timeout)))
        return self._collect(world_size, timeout)

    def close(self) -> None:
        """End the processes. The next job would start new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.wait()
        self._workers.clear()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        self._folder.cleanup()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", _START.format(__name__), str(theirs.fileno()), json.dumps(sys.path)]
        environment = dict(os.environ)
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        return process, ours

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        """Wait for all ranks. Where one fails the others get a short time to notice; if one hangs, all are replaced."""
        results: dict[int, Any] = {}
        failures: list[JobError] = []
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = ", ".join(str(rank) for rank in waiting.values())
                failures.append(JobError(min(waiting.values()), f"no answer from rank {ranks} in {timeout:.0f} s"))
                self.close()
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    failures.append(JobError(rank, f"the process ended with code {self._workers[rank][0].wait()}"))
                    self.close()
                    raise _cause(failures) from None
                if succeeded:
                    results[rank] = value
                else:
                    failures.append(JobError(rank, value))
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if failures:
            raise _cause(failures)
        return [results[rank] for rank in range(world_size)]


def _cause(failures: list[JobError]) -> JobError:
    """The failure that the others follow from: not that of a rank whose peer had left."""
    return next((failure for failure in failures if "gloo/transport" not in str(failure)), failures[0])


_shared: Processes | None = None


def shared_processes() -> Processes:
    """The three processes that all checks of this interpreter share; they end with it."""
    global _shared
    if _shared is None:
        _shared = Processes(3)
        atexit.register(_shared.close)
    return _shared


def serve(descriptor: int) -> None:
    """The loop of a worker process: jobs come in, (succeeded, result or error text) go out, until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    connection = Connection(descriptor)
    while True:
        try:
            sys.path[:] = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, _run(*pickle.loads(connection.recv_bytes())))
        except BaseException as error:  # torch's CheckpointException is no Exception
            answer = (False, f"{type(error).__name__}: {_gist(error)}")
        # Not connection.send(), which would pass tensors on as shared memory that ends with this process.
        connection.send_bytes(pickle.dumps(answer))


def _gist(error: BaseException) -> str:
    """The message; of one that quotes a traceback, as torch's CheckpointException does, its last line; without any
    message the place."""
    text = str(error).strip()
    if not text and error.__traceback__ is not None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{place.line} ({Path(place.filename).name}:{place.lineno})"
    return text.splitlines()[-1].strip() if "Traceback" in text else text


def _run(job: Callable[..., T], args: tuple[Any, ...], rank: int, size: int, meeting_point: str, timeout: float) -> T:
    import torch.distributed as dist

    address = Path(meeting_point).as_uri()
    dist.init_process_group("gloo", address, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        return job(*args)
    finally:
        dist.destroy_process_group()
