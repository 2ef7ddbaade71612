"""Two ranks: gsnr and noise_scale log what one process with the same gradients logs, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gsnr_rank_jobs
import pytest
from plain_trainer import scalars

from lbzoo.testing.processes import shared_processes

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("name", ["adamw", "vr_lamb"])
@pytest.mark.parametrize("job", [gsnr_rank_jobs.train_ddp, gsnr_rank_jobs.train_sharded])
def test_two_ranks_of_two_micro_batches_are_one_of_four(tmp_path: Path, job: Any, name: str) -> None:
    files, files_of_second = shared_processes().run(2, job, tmp_path, name, 2)
    assert files
    assert files_of_second == []
    gsnr_rank_jobs.train_alone(tmp_path / "alone", name, 4)
    two, one = scalars(tmp_path / "rank0"), scalars(tmp_path / "alone")
    assert {"gsnr/0.weight", "summary/gsnr_at_gamma", "noise_scale/2.bias"} <= one.keys()
    assert one.keys() == two.keys()
    for tag in one:
        assert two[tag] == pytest.approx(one[tag], rel=1e-5), tag
