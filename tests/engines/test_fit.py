"""Whole runs on embedded data: the run folder, exact resume, several processes, and what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lbzoo.checkpoint import CheckpointFolder
from lbzoo.checkpoint.format import load_weights
from lbzoo.engines import fit, validate
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.errors import CheckpointError, DataError, LbzooError, UsageError
from lbzoo.recipe import build_task, load_recipe
from lbzoo.tasks.image_classification import ImageClassification

# LayerNorm, dropout and augmentation: every source of randomness, and nothing that depends on the micro-batch.
RECIPE = """\
# A small network on digits.
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1, 1, 1], width_factor: 0.25,
       drop_rate: 0.1}}
data: {name: digits, global_batch_size: 64, micro_batch_size: 16, image_size: 16}
optimizer: {name: novograd, lr: 0.01, weight_decay: 0.001}
schedule: {name: cosine, warmup_steps: 2}
steps: 8
trainer: {accelerator: cpu, devices: 1, validate_every: {steps: 4}}
checkpoint: {every_steps: 2, keep_last: 10}
logging: {every: 1}
callbacks: [trust_ratio]
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    result = fit(recipe, runs=tmp_path_factory.mktemp("runs"))
    assert (result.state, result.exit_code, result.step) == ("finished", 0, 8)
    return result.run_dir


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    load_weights(CheckpointFolder(run / "checkpoints").step_path(step), module)
    return module.state_dict()


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing


class StopAfter:
    """Sends this process a signal from inside the given optimizer step, as an operator would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
        from lbzoo.engines.run_callbacks import MicroBatchSeeds

        original = MicroBatchSeeds.on_train_batch_start

        def hook(callback: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            original(callback, trainer, module, batch, batch_idx)
            if trainer.global_step == step - 1 and batch_idx % trainer.accumulate_grad_batches == 1:
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(MicroBatchSeeds, "on_train_batch_start", hook)


def test_the_run_folder(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["metrics"]["val/top1"] == status["best"]["value"] or status["best"]["step"] < 8
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "val/top1" in line] == [4, 8]
    assert lines[3]["samples"] == 256
    assert all(line["stage"] == "train" for line in lines)
    assert all({"train/loss", "summary/lr", "summary/trust_ratio_p50"} <= line.keys() for line in lines)
    assert lines[0]["summary/lr"] == pytest.approx(0.005)  # warmup: half the peak at step 1 of 2
    environment = json.loads((run / "environment.json").read_text())["starts"]
    assert environment[0]["packages"]["lbzoo"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_symlink()) == ["best", "last"]
    assert CheckpointFolder(run / "checkpoints").steps() == [2, 4, 6, 8]
    assert load_recipe(run / "recipe.yaml").hash == status["recipe_hash"]


def test_tensorboard_has_a_trust_ratio_of_each_layer(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    layers = [tag for tag in tags if tag.startswith("trust_ratio/")]
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    assert len(layers) == len(list(module.parameters()))
    for tag in (layers[0], "summary/trust_ratio_p50"):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/top1")] == [4, 8]


@pytest.mark.parametrize(
    ("engine", "step", "signum", "then"),
    [
        ("lightning", 3, signal.SIGTERM, "lightning"),
        ("lightning", 4, signal.SIGINT, "accelerate"),
        ("accelerate", 3, signal.SIGTERM, "lightning"),
        ("accelerate", 4, signal.SIGINT, "accelerate"),
    ],
)
def test_stopped_and_resumed_is_the_uninterrupted_run(
    recipe: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    engine: str, step: int, signum: int, then: str,
) -> None:  # fmt: skip
    """Bit for bit, and every step stands once in every log; step 4 is one at which validation was due."""
    with monkeypatch.context() as patch:
        StopAfter(patch, step, signum)
        stopped = fit(recipe, [f"trainer.engine={engine}"], runs=tmp_path)
    assert (stopped.state, stopped.exit_code, stopped.step) == ("interrupted", 128 + signum, step)
    cut = tmp_path / "small" / "1"
    status = json.loads((cut / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("interrupted", 128 + signum, step)

    said: list[str] = []
    result = fit(recipe, [f"trainer.engine={then}"], runs=tmp_path, resume="auto", say=said.append)
    assert result.run_dir == cut
    assert any(f"at step {step}" in text for text in said)
    assert_same_weights(weights(cut, 8), weights(run, 8))

    expected, actual = (read_metrics(folder / "metrics.jsonl") for folder in (run, cut))
    timed = ("time", "summary/samples_per_second")
    for line in (*expected, *actual):
        for key in timed:
            line.pop(key, None)
    assert actual == expected
    events = EventAccumulator(str(cut / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/top1")] == [4, 8]


def test_resume_from_an_older_checkpoint_after_damage(recipe: Path, run: Path, tmp_path: Path) -> None:
    """A newest checkpoint that was cut short is passed over with a warning."""
    copy = tmp_path / "small" / "1"
    shutil.copytree(run, copy, symlinks=True)
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    file = next(CheckpointFolder(copy / "checkpoints").step_path(8).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    said: list[str] = []
    fit(recipe, runs=tmp_path, resume="auto", say=said.append)
    assert any("warning" in text and "1,000 of its" in text for text in said)
    assert any("at step 6" in text for text in said)
    assert_same_weights(weights(copy, 8), weights(run, 8))


@pytest.mark.parametrize("what", ["damaged", "copied without links", "killed before the link"])
def test_resume_by_the_run_s_folder(recipe: Path, run: Path, tmp_path: Path, what: str) -> None:
    """Goes on from where ``--resume auto`` would."""
    copy = tmp_path / "small" / "1"
    shutil.copytree(run, copy, symlinks=what != "copied without links")
    folder = CheckpointFolder(copy / "checkpoints")
    if what == "damaged":
        file = next(folder.step_path(8).glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:1000])
    elif what == "killed before the link":
        folder.link("last", 6)
    result = fit(recipe, runs=tmp_path, resume=copy)
    assert (result.run_dir.resolve(), result.state, result.step) == (copy, "finished", 8)
    assert_same_weights(weights(copy, 8), weights(run, 8))


def test_resume_by_another_checkpoint_is_refused(recipe: Path, run: Path) -> None:
    with pytest.raises(UsageError, match=r"step_00000004 is not the last checkpoint .*--init-from"):
        fit(recipe, resume=run / "checkpoints" / "step_00000004")


def test_a_finished_run_stays_what_it_is(recipe: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "small" / "1"
    shutil.copytree(run, copy, symlinks=True)
    result = fit(recipe, runs=tmp_path, resume=copy)
    before, after = (json.loads((path / "status.json").read_text()) for path in (run, copy))
    assert (result.state, result.step) == ("finished", 8)
    assert (after["best"], after["metrics"]) == (before["best"], before["metrics"])


LOCK = """\
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_trains(recipe: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "small" / "1"
    shutil.copytree(run, copy, symlinks=True)
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps({**status, "state": "running"}))
    command = [sys.executable, "-c", LOCK, str(copy / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"{copy} is being trained by process {status['pid']} on"):
            fit(recipe, runs=tmp_path, resume="auto")
        other.communicate("")
    assert fit(recipe, runs=tmp_path, resume="auto").state == "finished"


def test_a_status_that_is_damaged(recipe: Path, run: Path, tmp_path: Path) -> None:
    """A power cut may leave it empty: the run is found, and its recipe known from its checkpoint."""
    copy = tmp_path / "small" / "1"
    shutil.copytree(run, copy, symlinks=True)
    (copy / "status.json").write_text("")
    with pytest.raises(CheckpointError, match=r"optimizer\.lr was 0\.01 and is 0\.02"):
        fit(recipe, ["optimizer.lr=0.02"], runs=tmp_path, resume="auto")
    assert fit(recipe, runs=tmp_path, resume="auto").run_dir == copy


def test_nothing_to_resume_starts_a_new_run(recipe: Path, run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = fit(recipe, ["steps=1", "schedule.warmup_steps=0"], runs=tmp_path, resume="auto", say=said.append)
    assert result.step == 1
    assert any("nothing to resume" in text for text in said)
    again = fit(recipe, ["steps=1", "schedule.warmup_steps=0"], runs=tmp_path, resume="auto")
    assert again.run_dir != result.run_dir, "a finished run is never overwritten"


def test_resume_with_another_recipe_is_refused(recipe: Path, run: Path) -> None:
    """What differs and is free to, as devices are, is not named."""
    free = ["trainer.engine=accelerate", "logging.every=2", "checkpoint.keep_last=3"]
    with pytest.raises(CheckpointError, match=r"another recipe: optimizer\.lr was 0\.01 and is 0\.02\. .*--init-from"):
        fit(recipe, [*free, "optimizer.lr=0.02"], resume=run)


def test_resume_and_init_from_exclude_each_other(recipe: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="--init-from"):
        fit(recipe, resume=run, init_from=run)


def test_init_from_starts_with_the_weights_alone(recipe: Path, run: Path, tmp_path: Path) -> None:
    result = fit(recipe, ["steps=1", "optimizer.lr=0", "schedule.warmup_steps=0"], runs=tmp_path, init_from=run)
    mine, theirs = weights(result.run_dir, 1), weights(run, 8)
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    for name, _ in module.named_parameters():
        assert torch.equal(mine[name], theirs[name]), name


def test_init_from_another_model_is_named(recipe: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another model: \d+ entries differ"):
        fit(recipe, ["task.model_args.width_factor=0.5"], runs=tmp_path, init_from=run)
    assert json.loads((tmp_path / "small" / "1" / "status.json").read_text())["state"] == "failed"


def test_validate_gives_the_run_s_own_numbers(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    assert validate(run, prefer="last") == pytest.approx(status["metrics"], abs=1e-6)
    assert validate(run)["val/top1"] == pytest.approx(status["best"]["value"], abs=1e-6)


@pytest.mark.parametrize("engine", ["lightning", "accelerate"])
def test_no_process_of_a_loader_is_left(
    recipe: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends would wait for them for ever. Neither after a run nor after one that failed."""
    words = ["trainer.num_workers=1", f"trainer.engine={engine}", "logging.loggers=[]"]
    result = fit(recipe, words, runs=tmp_path)
    assert not multiprocessing.active_children()
    validate(result.run_dir)
    assert not multiprocessing.active_children()
    batches: list[Any] = []

    def fail(self: Any, batch: Any, batch_idx: int) -> None:
        batches.append(batch_idx)
        assert multiprocessing.active_children()
        raise LbzooError("on purpose")

    monkeypatch.setattr(ImageClassification, "training_step", fail)
    with pytest.raises(LbzooError, match="on purpose"):
        fit(recipe, words, runs=tmp_path)
    assert batches == [0]
    assert not multiprocessing.active_children()


def test_gradients_are_clipped_to_their_global_norm(recipe: Path, tmp_path: Path) -> None:
    """Plain SGD at rate 1 moves the weights by exactly the clipped gradient."""
    words = [
        "steps=1",
        "schedule={name: constant, warmup_steps: 0}",
        "optimizer={name: sgd, lr: 1.0, weight_decay: 0}",
        "trainer.gradient_clip_norm=0.125",
    ]
    start = build_task_at_start(recipe)
    result = fit(recipe, words, runs=tmp_path)
    moved = [weights(result.run_dir, 1)[name] - before for name, before in start.items()]
    assert torch.cat([m.flatten().double() for m in moved]).norm().item() == pytest.approx(0.125, rel=1e-4)
    line = read_metrics(result.run_dir / "metrics.jsonl")[0]
    assert line["summary/grad_norm"] > 1, "the logged norm is that before clipping"


def build_task_at_start(recipe: Path) -> dict[str, torch.Tensor]:
    """The parameters that a run of the recipe begins with."""
    resolved = load_recipe(recipe)
    torch.manual_seed(resolved.seed)
    return {name: p.detach().clone() for name, p in build_task(resolved.stages[0]).named_parameters()}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(recipe: Path, tmp_path: Path, precision: str) -> None:
    # At 16 pixels the last stage is 1x1, and there torch's bf16 convolutions on CPU have NaN gradients at times.
    result = fit(recipe, [f"trainer.precision={precision}", "data.image_size=32"], runs=tmp_path)
    assert (result.state, result.step) == ("finished", 8)
    dtype = weights(result.run_dir, 8)["model.stem.conv.weight"].dtype
    assert dtype == torch.float32  # loaded into a float32 model, whatever was saved
    losses = [line["train/loss"] for line in read_metrics(result.run_dir / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.dist
def test_two_processes_train_the_same_weights(recipe: Path, run: Path, tmp_path: Path) -> None:
    """Same samples, same dropout, same steps: 1 device with 4 micro-batches against 2 devices with 2."""
    result = fit(recipe, ["trainer.devices=2"], runs=tmp_path)
    assert (result.state, result.exit_code) == ("finished", 0)
    one, two = weights(run, 8), weights(result.run_dir, 8)
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    for name, _ in module.named_parameters():
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert not (tmp_path / "small" / "2").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_under_slurm_and_under_torchrun(recipe: Path, run: Path, tmp_path: Path) -> None:
    """Processes that somebody else started: in one run folder, rank 0 alone speaks, the same weights."""
    base = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    words = ["-m", "lbzoo", "fit", str(recipe), "trainer.devices=auto", "--runs", str(tmp_path)]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0",
             "SLURM_NODELIST": "localhost"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**base, **slurm, "SLURM_PROCID": r, "SLURM_LOCALID": r},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in "01"
    ]
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert "finished at step 8" in outputs[0]
    assert outputs[1] == ""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    done = subprocess.run(torchrun, env=base, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert done.stdout.count("finished at step 8") == 1
    module = build_task(load_recipe(run / "recipe.yaml").stages[0])
    for folder in (tmp_path / "small" / "1", tmp_path / "small" / "2"):
        two, one = weights(folder, 8), weights(run, 8)
        for name, _ in module.named_parameters():
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "signum"),
    [
        ("lightning", signal.SIGINT), ("lightning", signal.SIGTERM), ("lightning", signal.SIGKILL),
        ("accelerate", signal.SIGTERM), ("accelerate", signal.SIGKILL),
    ],
)  # fmt: skip
def test_a_signal_to_the_launcher_saves_and_leaves_no_process(
    recipe: Path, tmp_path: Path, engine: str, signum: int
) -> None:
    """The ranks agree on a step, save, and go; even where the launcher itself is killed. Another number goes on."""
    words = ["fit", str(recipe), "steps=100000", "trainer.validate_every.steps=100000", "checkpoint.every_steps=50000",
             f"trainer.engine={engine}", "--runs", str(tmp_path)]  # fmt: skip
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([sys.executable, "-m", "lbzoo", *words, "trainer.devices=2"], env=base)
    run_dir = tmp_path / "small" / "1"
    wait_until(lambda: len(read_metrics(run_dir / "metrics.jsonl")) > 20)
    launcher.send_signal(signum)
    assert launcher.wait(timeout=60) == (-signum if signum == signal.SIGKILL else 128 + signum)
    wait_until(lambda: json.loads((run_dir / "status.json").read_text())["state"] == "interrupted")
    wait_until(lambda: subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).returncode == 1)
    stopped_at = json.loads((run_dir / "status.json").read_text())["step"]
    assert CheckpointFolder(run_dir / "checkpoints").steps()[-1] == stopped_at > 20
    resumed = subprocess.Popen([sys.executable, "-m", "lbzoo", *words, "--resume", "auto"], env=base)
    wait_until(lambda: read_metrics(run_dir / "metrics.jsonl")[-1]["step"] > stopped_at)
    resumed.send_signal(signal.SIGTERM)
    assert resumed.wait(timeout=60) == 143
    steps = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.dist
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_while_it_starts(recipe: Path, tmp_path: Path, signum: int) -> None:
    words = ["fit", str(recipe), "trainer.devices=2", "--runs", str(tmp_path)]
    launcher = subprocess.Popen([sys.executable, "-m", "lbzoo", *words])
    wait_until(lambda: (tmp_path / "small" / "1" / "status.json").is_file())
    time.sleep(1)
    launcher.send_signal(signum)
    assert launcher.wait(timeout=60) == 128 + signum
    assert json.loads((tmp_path / "small" / "1" / "status.json").read_text())["state"] == "interrupted"


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["lightning", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_an_error_on_one_rank_ends_the_run_with_its_words(recipe: Path, tmp_path: Path, engine: str) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import os\n"
        "from lightning.pytorch import Callback\n"
        "from lbzoo.errors import LbzooError\n"
        "from lbzoo.registry import register_callback\n\n"
        "@register_callback('fails_on_rank_1')\n"
        "class Fails(Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_rank == 1 and trainer.global_step == 2:\n"
        "            raise LbzooError('the disk of this machine is on fire')\n"
    )
    mine = tmp_path / "failing.yaml"
    text = RECIPE.replace("callbacks: [trust_ratio]", "callbacks: [fails_on_rank_1]\nplugins: [./plugin.py]")
    mine.write_text(text)
    result = fit(mine, ["trainer.devices=2", f"trainer.engine={engine}"], runs=tmp_path / "runs")
    assert (result.state, result.exit_code) == ("failed", 1)
    status = json.loads((result.run_dir / "status.json").read_text())
    assert status["error"] == "rank 1: the disk of this machine is on fire"


def test_a_batch_that_does_not_divide(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(LbzooError, match="global_batch_size"):
        fit(recipe, ["trainer.devices=3"], runs=tmp_path)
    assert not (tmp_path / "small").exists(), "nothing is written for a run that cannot start"


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train"):
        fit("resnet50_novograd_32k", [f"data.root={tmp_path}"], runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
