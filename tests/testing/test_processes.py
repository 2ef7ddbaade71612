"""Worker processes: what comes back, and what a failing or hanging rank does to the others."""

from __future__ import annotations

import process_jobs
import pytest
import torch

from lbzoo.testing import processes as module
from lbzoo.testing.processes import JobError, Processes

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def two():
    with Processes(2) as processes:
        yield processes


def test_results_of_all_ranks_in_order(two):
    for size, total in ((2, 3.0), (1, 1.0)):
        results = two.run(size, process_jobs.add_up, [1.0, 2.0])
        assert [(rank, world) for rank, world, _ in results] == [(rank, size) for rank in range(size)]
        assert all(torch.equal(value, torch.tensor(total)) for *_, value in results)


def test_processes_serve_many_jobs(two):
    assert two.run(2, process_jobs.process_id) == two.run(2, process_jobs.process_id)


def test_error_of_one_rank_is_named_and_the_processes_live_on(two):
    before = two.run(2, process_jobs.process_id)
    with pytest.raises(JobError, match="rank 1: KeyError: 'only here'") as caught:
        two.run(2, process_jobs.raise_on_rank_1)
    assert caught.value.rank == 1
    assert two.run(2, process_jobs.process_id) == before


def test_exceptions_that_are_no_exception_are_reported(two):
    with pytest.raises(JobError, match="SystemExit: 7"):
        two.run(1, process_jobs.raise_base_exception)


def test_process_that_dies_is_replaced(two):
    with pytest.raises(JobError, match="ended with code 3"):
        two.run(1, process_jobs.die)
    assert len(two.run(2, process_jobs.process_id)) == 2


def test_hanging_rank_ends_with_the_time_limit(two):
    with pytest.raises(JobError, match="no answer from rank 0 in 1 s"):
        two.run(2, process_jobs.hang_on_rank_0, timeout=1.0)


def test_failure_is_reported_though_another_rank_hangs(two, monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 0.5)
    with pytest.raises(JobError, match="rank 0: ValueError: first"):
        two.run(2, process_jobs.fail_while_the_other_hangs)


def test_more_ranks_than_processes(two):
    with pytest.raises(ValueError, match="world_size 3 of 2"):
        two.run(3, process_jobs.process_id)
