"""Two torchrun agents with two ranks each, which find each other by rendezvous, as on two nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fit_jobs import fit_here, saved_weights

from lbzoo.checkpoint import CheckpointFolder
from lbzoo.cli import main
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.engines.run_folder import RunFolder

RECIPE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25}}
data: {name: digits, global_batch_size: 64, micro_batch_size: 16, image_size: 16}
optimizer: {name: lamb, lr: 0.01}
steps: 400
trainer: {accelerator: cpu, devices: auto, validate_every: {steps: 1000}, timeout: 60}
checkpoint: {every_steps: 10, keep_last: 2}
logging: {every: 1, loggers: []}
"""


class Agents:
    """Two of them, each in a session of its own, which stands for a node."""

    def __init__(self, recipe: Path, runs: Path, *overrides: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = Path(__file__).parents[2] / "scripts" / "torchrun.sh"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NODES": "2",
            "DEVICES": "2",
            "FIRST_NODE": "127.0.0.1",
            "PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        words = [str(script), str(recipe), *overrides, "--runs", str(runs)]
        self.run = RunFolder(runs / recipe.stem / "1")
        self.outputs = [runs.with_name(f"{runs.name}-{number}.txt") for number in (1, 2)]
        self.processes = [
            subprocess.Popen(words, env=environment, stdout=file.open("a"), stderr=subprocess.STDOUT,
                             start_new_session=True)
            for file in self.outputs
        ]  # fmt: skip

    def wait(self, seconds: float = 240) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: len(read_metrics(self.run.metrics_file)) >= step or any(p.poll() for p in self.processes))

    def lose_node(self, number: int) -> None:
        """All of its processes at once, without a word."""
        session = self.processes[number].pid
        found = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True).stdout.split()
        for pid in found:
            os.kill(int(pid), signal.SIGKILL)

    def text(self) -> str:
        return "".join(file.read_text() for file in self.outputs)


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.dist
@pytest.mark.slow
def test_stopped_on_one_node_and_resumed_on_both(recipe: Path, tmp_path: Path) -> None:
    """torchrun is killed on one node: all four ranks save and leave. Started again they train what one process does."""
    overrides = ["steps=60", "trainer.precision=64-true"]  # rounding grows over 60 steps
    agents = Agents(recipe, tmp_path / "runs", *overrides)
    agents.wait_for_step(12)
    agents.processes[1].kill()
    assert 0 not in agents.wait(), agents.text()
    assert agents.run.status()["state"] == "interrupted", agents.text()
    stopped_at = agents.run.checkpoints.steps()[-1]
    assert 12 <= stopped_at < 60
    again = Agents(recipe, tmp_path / "runs", *overrides)
    assert again.wait() == [0, 0], again.text()
    assert again.text().count("finished at step 60") == 1
    assert f"at step {stopped_at}" in again.text()
    expected = saved_weights(fit_here(recipe, overrides, tmp_path / "alone").run_dir)
    actual = saved_weights(again.run.path)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-8, msg=name)
    assert [line["step"] for line in read_metrics(again.run.metrics_file)] == list(range(1, 61))


@pytest.mark.dist
@pytest.mark.slow
def test_a_node_that_dies(recipe: Path, tmp_path: Path) -> None:
    """The other one says what it knows within its timeout, and the run goes on from the last checkpoint."""
    agents = Agents(recipe, tmp_path / "runs")
    agents.wait_for_step(15)
    agents.lose_node(1)
    assert agents.processes[0].wait(120) != 0
    assert "another rank has ended, or did not answer within trainer.timeout (60 s)" in agents.text()
    assert "--resume auto" in agents.text()
    assert agents.run.status()["state"] == "failed"
    saved = CheckpointFolder(agents.run.checkpoints.path).steps()
    assert saved[-1] >= 10
    again = Agents(recipe, tmp_path / "runs")
    wait_until(lambda: f"at step {saved[-1]}" in again.text() and agents.run.checkpoints.steps()[-1] > saved[-1])
    for number in (0, 1):
        again.lose_node(number)


def test_the_sum_for_1536_devices(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "data.global_batch_size=98304",
        "data.micro_batch_size=64",
        "data.name=imagenet",
        "data.image_size=224",
    ]
    words = [*overrides, "data.image_size=224", "trainer.devices=8", "trainer.num_nodes=192"]
    with pytest.raises(SystemExit) as left:
        main(["plan", str(recipe), *words, "--no-model"])
    printed = capsys.readouterr()
    assert left.value.code == 0, printed.err
    assert "98,304 = 64 x 8" in printed.out
    assert "x 192 nodes x 1 accumulated" in printed.out
