"""The benchmark of optimizer steps: which samples count, what the result says. No test of how long anything takes."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import optimizer_step  # noqa: E402
import timing  # noqa: E402
from optimizer_step import REFERENCE, Report, Row  # noqa: E402
from timing import Timing  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """What ran, in order, on a machine that is idle."""
    ran: list[str] = []
    monkeypatch.setattr(timing, "wait_for_quiet", lambda deadline: True)
    return ran


def fake_samples(monkeypatch, samples):
    def timed(contestant, synchronize, clock):
        contestant()
        return next(samples)

    monkeypatch.setattr(timing, "_timed", timed)


def contestants(ran, names="ab"):
    return {name: (lambda name=name: ran.append(name)) for name in names}


def test_contestants_take_turns_in_random_order(calls, monkeypatch):
    fake_samples(monkeypatch, itertools.repeat((1.0, 0.0)))
    timings = timing.compare(contestants(calls, "abc"), samples=8, warmup=1)
    assert calls[:3] == ["a", "b", "c"], "warmup"
    rounds = [tuple(calls[start : start + 3]) for start in range(3, len(calls), 3)]
    assert len(rounds) == 8
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2
    assert {name: len(each.seconds) for name, each in timings.items()} == dict.fromkeys("abc", 8)


def test_samples_that_waited_for_a_core_do_not_count(calls, monkeypatch):
    fake_samples(monkeypatch, itertools.cycle([(1.0, 0.5), (2.0, 0.0), (3.0, 0.01)]))
    timings = timing.compare(contestants(calls, "a"), samples=4, warmup=0)
    assert timings["a"].seconds == [2.0, 3.0, 2.0, 3.0]
    assert timings["a"].discarded == 2


def test_waiting_does_not_matter_to_processor_time(calls, monkeypatch):
    fake_samples(monkeypatch, itertools.repeat((1.0, 0.5)))
    assert timing.compare(contestants(calls, "a"), samples=2, warmup=0, cpu_time=True)["a"].seconds == [1.0, 1.0]


def test_machine_that_is_never_idle_ends_with_the_time_limit(calls, monkeypatch):
    monkeypatch.setattr(timing, "wait_for_quiet", lambda deadline: False)
    timings = timing.compare(contestants(calls), samples=3, warmup=0)
    assert math.isnan(timings["a"].median)
    assert calls == []


def test_idle_is_seen_and_so_is_work(monkeypatch):
    seconds = itertools.count(0.0, 0.001)  # of core time, a millisecond in each look
    monkeypatch.setattr(timing, "_core_seconds", lambda: next(seconds))
    assert timing.wait_for_quiet(deadline=math.inf)
    seconds = itertools.count(0.0, 1.0)
    assert not timing.wait_for_quiet(deadline=-math.inf)
    monkeypatch.setattr(timing, "_core_seconds", lambda: None)
    assert timing.wait_for_quiet(deadline=-math.inf), "where the system does not say"


def test_median_and_spread():
    assert Timing([4.0, 1.0, 2.0, 3.0, 5.0]).median == 3.0
    assert Timing([4.0, 1.0, 2.0, 3.0, 5.0]).spread == pytest.approx(1 / 3)
    assert math.isnan(Timing([1.0, 2.0]).spread)


def test_report():
    rows = [
        Row(REFERENCE, Timing([0.010] * 3), 1.0, 2.0, 0.1),
        Row("lamb", Timing([0.018] * 3, discarded=2), 1.8, 2.0, 9.4),
        Row("lars", Timing([0.015] * 3), 1.5, 1.0),
        Row("novograd", Timing(discarded=4), math.nan),
        Row("lans", Timing(), math.nan, note="no optimizer named 'lans'"),
    ]
    text = "\n".join(optimizer_step._model(Report("tiny", 10_000_000, 4, 9.0, 28e9, rows)))
    assert "28 bytes a parameter\ntake 10.0 ms" in text
    assert "| lamb | 18.0 | 1.80 | 0% | 2 of 5 | 15.6 | 2 | 9.4 |" in text
    assert "| novograd | no sample without waiting for a core (4 discarded)" in text
    assert "| lans | no optimizer named 'lans' |" in text
    assert f"| lamb / {REFERENCE} | 1.80 | 2.00 | 1.60 | must reached |" in text
    assert f"| lars / {REFERENCE} | 1.50 | 1.20 | 1.00 | missed |" in text
    assert "| novograd /" not in text


def test_runs_from_end_to_end(capsys, monkeypatch):
    monkeypatch.setattr(timing, "wait_for_quiet", lambda deadline: True)
    monkeypatch.setattr(timing, "ACCEPTED_WAIT", math.inf)
    optimizer_step.main(["--models", "tiny", "--optimizers", "lamb", "--samples", "3", "--no-memory", "--dry-run"])
    output = capsys.readouterr().out
    assert "## tiny: 0.2M parameters in 4 tensors" in output
    assert f"| lamb / {REFERENCE} |" in output


def test_extra_memory_of_a_step_is_that_of_its_temporaries():
    """In a process of its own, as the benchmark does: AdamW without fused kernels needs tensors like the parameters."""
    largest = 0.5  # MiB, the weight of "tiny"
    assert optimizer_step.extra_memory("tiny", REFERENCE, "cpu") < largest
    assert largest <= optimizer_step.extra_memory("tiny", "torch AdamW", "cpu") < 8 * largest
