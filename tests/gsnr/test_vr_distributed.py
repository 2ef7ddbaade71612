"""The VR optimizers in every layout: the weights are those of one process."""

from __future__ import annotations

from pathlib import Path

import gsnr_jobs
import pytest
import torch

from lbzoo.testing.processes import Processes

pytestmark = pytest.mark.dist

OPTIONS = {"lr": 0.02, "weight_decay": 0.01}
STEPS = 4


@pytest.mark.parametrize("base", ["lamb", "momentum", "adamw", "lars"])
@pytest.mark.parametrize(
    ("layout", "ranks", "micro_batches"),
    [("ddp", 4, 1), ("ddp view", 2, 2), ("fsdp", 4, 1), ("fsdp", 2, 2), ("hsdp", 4, 1), ("mixed", 2, 2)],
)
def test_weights_are_those_of_one_process(
    four_ranks: Processes, base: str, layout: str, ranks: int, micro_batches: int
) -> None:
    alone = four_ranks.run(1, gsnr_jobs.train_vr, "ddp", base, 4, STEPS, OPTIONS)[0]["weights"]
    results = four_ranks.run(ranks, gsnr_jobs.train_vr, layout, base, micro_batches, STEPS, OPTIONS)
    for name, expected in alone.items():
        torch.testing.assert_close(results[0]["weights"][name], expected, rtol=1e-4, atol=1e-5)
        for result in results[1:]:
            assert torch.equal(result["weights"][name], results[0]["weights"][name]), "replicas have drifted apart"


@pytest.mark.parametrize(
    ("layout", "base", "budget"),
    [("fsdp", "lamb", 2), ("fsdp", "momentum", 1), ("hsdp", "lans", 3), ("ddp", "lamb", 0)],
)
def test_one_collective_more_than_the_base(four_ranks: Processes, layout: str, base: str, budget: int) -> None:
    result = four_ranks.run(4, gsnr_jobs.train_vr, layout, base, 1, 2, OPTIONS)[0]
    assert result["collectives"] == budget


def test_saved_on_two_ranks_and_resumed_on_others(four_ranks: Processes, tmp_path: Path) -> None:
    straight = four_ranks.run(2, gsnr_jobs.resume_vr, str(tmp_path / "whole"), True, 5)[0]
    folder = str(tmp_path / "half")
    four_ranks.run(2, gsnr_jobs.resume_vr, folder, True, 3)
    for ranks in (1, 4):
        resumed = four_ranks.run(ranks, gsnr_jobs.resume_vr, folder, False, 2)[0]
        for name, expected in straight.items():
            torch.testing.assert_close(resumed[name], expected, rtol=1e-4, atol=1e-5)
