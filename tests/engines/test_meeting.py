"""Processes that should make one run and do not find each other: a named error before the first step."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import pytest
from distributed import on_ranks

from lbzoo.engines import distributed, fit
from lbzoo.engines.launch import World
from lbzoo.errors import LbzooError
from lbzoo.testing.processes import JobError

RECIPE = """\
version: 1
task: {name: "parity_tasks:LayerNormNet"}
data: {name: "parity_tasks:Vectors", global_batch_size: 16, micro_batch_size: 4}
optimizer: {name: lamb, lr: 0.01}
steps: 2
trainer: {accelerator: cpu}
"""


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_a_process_group_that_the_recipe_knows_nothing_of(tmp_path: Path, engine: str) -> None:
    """Without the launcher's variables each process would be rank 0 of 1, and train the whole run."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(JobError, match=r"this process is rank \d of 2 in torch\.distributed, but rank 0 of 1"):
        on_ranks(2, partial(fit, runs=tmp_path / "runs"), recipe, [f"trainer.engine={engine}"])
    assert not (tmp_path / "runs").exists()


def test_two_of_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds the meeting point taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        world = World("cpu", 2, 1, 0, 0, "torchrun")
        message = r"the 2 processes of the run did not find each other at 127\.0\.0\.1:\d+ \(this one is rank 0\)"
        with pytest.raises(LbzooError, match=message), distributed.process_group(world):
            pass
