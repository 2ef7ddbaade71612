"""Independent jobs over processes, whose results do not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from lbzoo.errors import LbzooError

Job = Callable[[], None]
Progress = Callable[[str, int, int], None]
"""Called with (what is done, jobs done, jobs in all)."""


def run_jobs(what: str, jobs: Sequence[Job], processes: int, progress: Progress) -> None:
    """Run all jobs, which have to be picklable. The first error ends them; what is finished by then stays."""
    progress(what, 0, len(jobs))
    if processes == 1 or len(jobs) < 2:
        for number, job in enumerate(jobs, start=1):
            job()
            progress(what, number, len(jobs))
        return
    # Started afresh: a fork would copy the locks of tokenizers' and pyarrow's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_one_thread) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                future.result()
                progress(what, number, len(jobs))
        except BrokenProcessPool as error:
            raise LbzooError(f"{what}: a process was killed (out of memory?); try fewer with --processes") from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def default_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    """The processes share the cores among themselves."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
