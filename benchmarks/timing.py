"""Timing several things against each other on a machine that is not quiet.

Memory speed drifts with the hour and with what else runs, so two numbers measured one after the other cannot be
compared. :func:`compare` runs the contestants in turn, in a new random order each round. It begins a sample only when
the cores are idle, and keeps it only where the kernel did not let this process wait for a core meanwhile
(``/proc/self/task/*/schedstat``): two threads that share a core with somebody else are not twice but 10 to 50 times
slower. Where the machine is never idle, ``cpu_time`` counts the processor's time of one thread, in any company.

What comes out is good for ratios within one call. The bandwidth of the memory belongs into it, as a contestant.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ACCEPTED_WAIT = 0.03  # of a sample's duration: more, and the sample is discarded
QUIET = 0.15  # cores that others may keep busy


@dataclass
class Timing:
    """The samples of one contestant, in seconds; ``discarded`` counts those during which it had to wait for a core."""

    seconds: list[float] = field(default_factory=list)
    discarded: int = 0

    @property
    def median(self) -> float:
        """NaN without samples."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median; NaN for fewer than three samples."""
        if len(self.seconds) < 3:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def compare(
    contestants: Mapping[str, Callable[[], object]],
    *,
    samples: int = 7,
    warmup: int = 2,
    time_limit: float = 120.0,
    synchronize: Callable[[], object] = lambda: None,
    cpu_time: bool = False,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time each contestant until it has ``samples`` accepted samples, or ``time_limit`` seconds have passed for all.

    ``synchronize`` waits for the device before and after a sample (``torch.cuda.synchronize``). ``cpu_time`` is
    meant for work on one thread.
    """
    timings = {name: Timing() for name in contestants}
    for _ in range(warmup):
        for contestant in contestants.values():
            contestant()
    order = random.Random(seed)
    deadline = time.perf_counter() + time_limit
    while time.perf_counter() < deadline:
        missing = [name for name in contestants if len(timings[name].seconds) < samples]
        if not missing:
            break
        # All of them, not only those that miss samples: what ran before is part of every sample's conditions.
        for name in order.sample(list(contestants), len(contestants)):
            if not cpu_time and not wait_for_quiet(deadline):
                return timings
            seconds, waited = _timed(
                contestants[name], synchronize, time.process_time if cpu_time else time.perf_counter
            )
            if waited > ACCEPTED_WAIT * seconds and not cpu_time:
                timings[name].discarded += 1
            else:
                timings[name].seconds.append(seconds)
    return timings


def _timed(
    contestant: Callable[[], object], synchronize: Callable[[], object], clock: Callable[[], float]
) -> tuple[float, float]:
    """(duration, time that threads of this process stood in the run queue meanwhile), in seconds."""
    synchronize()
    waited_before = seconds_in_run_queue()
    begin = clock()
    contestant()
    synchronize()
    return clock() - begin, seconds_in_run_queue() - waited_before


def wait_for_quiet(deadline: float) -> bool:
    """Sleep until the cores have been idle for a twentieth of a second; False if they are not before ``deadline``
    (of ``time.perf_counter``). True at once where the system does not say.
    """
    while True:
        before = _core_seconds()
        if before is None:
            return True
        begin = time.perf_counter()
        time.sleep(0.05)
        after = _core_seconds()
        assert after is not None
        if (after - before) / (time.perf_counter() - begin) <= QUIET:
            return True
        if time.perf_counter() > deadline:
            return False


def _core_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine began; None where the system does not say."""
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, soft_irq, steal = map(int, words)  # the two left out: idle, waiting for a disk
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def seconds_in_run_queue() -> float:
    """How long the threads of this process have waited for a core; 0 where the system does not say (not Linux)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended
            continue
    return total / 1e9


def machine() -> str:
    """The processor in words, with its number of cores."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def device_name(device: str) -> str:
    """What runs on ``device``, "cpu" or "cuda", in words."""
    if device != "cuda":
        return machine()
    import torch

    return torch.cuda.get_device_name()


def save_result(benchmark: str, text: str, device: str = "cpu") -> None:
    """Write the dated result file of this machine, and say where it is."""
    path = result_file(benchmark, device_name(device))
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")


def result_file(benchmark: str, machine_name: str) -> Path:
    """``results/<benchmark>_<date>_<machine>.md`` beside this file."""
    words = "".join(letter if letter.isalnum() else " " for letter in machine_name.lower()).split()
    return Path(__file__).parent / "results" / f"{benchmark}_{date.today().isoformat()}_{'_'.join(words)}.md"
