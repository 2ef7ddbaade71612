"""Two ranks: the numbers are those of one process on the joined batch, and they are written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_jobs
from plain_trainer import scalars

from lbzoo.testing.processes import shared_processes

pytestmark = pytest.mark.dist


def assert_same(one: dict[str, dict[int, float]], two: dict[str, dict[int, float]]) -> None:
    for table in (one, two):
        table.pop("summary/samples_per_second", None)
    assert one.keys() == two.keys()
    for tag in one:
        assert one[tag] == pytest.approx(two[tag], rel=2e-6), tag


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_ddp(tmp_path: Path, name: str) -> None:
    (printed, files), (printed_by_second, files_of_second) = shared_processes().run(
        2, rank_jobs.train_ddp, tmp_path, name, 4
    )
    assert printed.splitlines()[-1].startswith("trained 4 steps")
    assert printed_by_second == ""
    assert files
    assert files_of_second == []
    rank_jobs.train_alone(tmp_path / "alone", name, 4, accumulate=2)
    assert_same(scalars(tmp_path / "rank0"), scalars(tmp_path / "alone"))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_fsdp2(tmp_path: Path, name: str) -> None:
    processes = shared_processes()
    files, files_of_second = processes.run(2, rank_jobs.train_sharded, tmp_path / "two", name, 4)
    assert files
    assert files_of_second == []
    processes.run(1, rank_jobs.train_sharded, tmp_path / "one", name, 4)
    sharded = scalars(tmp_path / "two" / "rank0")
    assert "trust_ratio/scale" in sharded
    assert_same(sharded, scalars(tmp_path / "one" / "rank0"))
