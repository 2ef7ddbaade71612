"""The loss of a step is the mean over the items of the global batch, however they fall into micro-batches and ranks."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights
from token_task import IGNORED, TwoMeans, UnevenTokens
from torch import Tensor

from lbzoo.data.base import SampleKey
from lbzoo.data.sampling import StreamSampler
from lbzoo.engines.global_items import GlobalItems, ReadAhead
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.recipe import build_task, load_recipe
from lbzoo.tasks.linear_regression import LinearRegression

STEPS, GLOBAL, MICRO = 6, 16, 4
RECIPE = f"""\
version: 1
seed: 5
task: {{name: "token_task:TwoMeans"}}
data: {{name: "token_task:UnevenTokens", global_batch_size: {GLOBAL}, micro_batch_size: {MICRO}}}
optimizer: {{name: momentum, lr: 0.5}}
steps: {STEPS}
trainer: {{accelerator: cpu, precision: 64-true}}
logging: {{every: 1, loggers: []}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tokens.yaml"
    path.write_text(RECIPE)
    return path


def global_batches(source: UnevenTokens) -> list[list[tuple[Tensor, ...]]]:
    """The micro-batches of every step, in one process."""
    sampler = StreamSampler(num_samples=source.sizes[0], global_batch_size=GLOBAL, micro_batch_size=MICRO, seed=5,
                            steps=STEPS, preshuffled=True)  # fmt: skip
    samples = source.train_dataset()
    batches = [samples.__getitems__(keys) for keys in sampler]
    return [batches[start : start + GLOBAL // MICRO] for start in range(0, len(batches), GLOBAL // MICRO)]


def one_big_batch(recipe: Path, overrides: list[str]) -> tuple[dict[str, Tensor], list[float]]:
    """The same steps on whole global batches, in plain torch; the weights after them, and each step's loss."""
    resolved = load_recipe(recipe, overrides)
    torch.manual_seed(resolved.seed)
    task = build_task(resolved.stages[0]).double()
    assert isinstance(task, TwoMeans)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in global_batches(UnevenTokens(**resolved.stages[0].data.options)):
        tokens, targets, labels = (torch.cat(part) for part in zip(*step, strict=True))
        of_targets, of_labels = task.sums((tokens, targets, labels))
        of_targets = of_targets / max(int((targets != IGNORED).sum()), 1)
        loss = of_targets + of_labels / max(int((labels != IGNORED).sum()), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return task.state_dict(), losses


def test_the_data_is_as_uneven_as_it_should_be() -> None:
    """Or the other tests would show nothing: micro-batches differ, and some hold no item of a kind at all."""
    counts = [[int((targets != IGNORED).sum()) for _, targets, _ in step] for step in global_batches(UnevenTokens())]
    assert all(len(set(step)) > 1 for step in counts)
    assert min(min(step) for step in counts) == 0


def assert_is_one_big_batch(recipe: Path, overrides: list[str], run: Path) -> None:
    expected, losses = one_big_batch(recipe, overrides)
    actual = saved_weights(run)
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= 1e-12, name
    logged = [line["train/loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert logged == pytest.approx(losses, rel=1e-5)  # losses are added up in float32


@pytest.mark.dist
@pytest.mark.parametrize(
    ("engine", "ranks", "strategy"),
    [
        ("lightning", 1, "auto"),
        ("lightning", 2, "ddp"),
        ("lightning", 4, "ddp"),
        ("lightning", 2, "fsdp"),
        ("accelerate", 1, "auto"),
        ("accelerate", 2, "ddp"),
        ("accelerate", 4, "fsdp"),
    ],
)
def test_uneven_micro_batches_are_one_big_batch(
    recipe: Path, tmp_path: Path, engine: str, ranks: int, strategy: str
) -> None:
    """To 1e-12 in float64: 1 rank with 4 micro-batches, 2 with 2, 4 with 1."""
    overrides = [f"trainer.engine={engine}", f"trainer.devices={ranks}", f"trainer.strategy={strategy}"]
    run = on_ranks(ranks, fit_here, recipe, overrides, tmp_path)[0].run_dir
    assert_is_one_big_batch(recipe, overrides, run)


@pytest.mark.dist
def test_gradient_statistics_of_uneven_micro_batches_do_not_depend_on_the_ranks(recipe: Path, tmp_path: Path) -> None:
    """VRGD trains with the variance of the k gradients whose mean is that of the global batch."""
    overrides = ["optimizer={name: vr_lamb, lr: 0.02}", "callbacks=[gsnr, noise_scale]"]
    expected = fit_here(recipe, [*overrides, "trainer.devices=1"], tmp_path).run_dir
    for ranks, strategy in ((2, "ddp"), (4, "fsdp")):
        of_ranks = [*overrides, f"trainer.devices={ranks}", f"trainer.strategy={strategy}"]
        run = on_ranks(ranks, fit_here, recipe, of_ranks, tmp_path)[0].run_dir
        weights = saved_weights(run)
        for name, weight in saved_weights(expected).items():
            assert (weights[name] - weight).abs().max() <= 1e-10, name
        last, expected_last = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (run, expected))
        for tag in ("summary/gsnr_p50", "summary/noise_scale"):
            assert last[tag] == pytest.approx(expected_last[tag], rel=1e-5), tag


def test_no_item_anywhere(recipe: Path, tmp_path: Path) -> None:
    """A step without a single target trains on the labels alone; nothing becomes NaN."""
    overrides = ["data.empty=true", "trainer.devices=1"]
    run = fit_here(recipe, overrides, tmp_path).run_dir
    assert_is_one_big_batch(recipe, overrides, run)


def test_a_loop_that_does_not_count_ahead_takes_the_micro_batch_s_own_mean() -> None:
    task = TwoMeans()
    batch = UnevenTokens().train_dataset().__getitems__([SampleKey(60, 0), SampleKey(61, 0)])
    tokens, targets, labels = batch
    of_targets, of_labels = task.sums((tokens, targets, labels))
    expected = of_targets / (targets != IGNORED).sum() + of_labels / (labels != IGNORED).sum().clamp(min=1)
    assert task.training_step((tokens, targets, labels), 0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_micro_batch_without_items_gives_zero_and_zero_gradients() -> None:
    task = TwoMeans()
    nothing = torch.full((2, 6), IGNORED)
    loss = task.training_step((torch.zeros(2, 6, dtype=torch.long), nothing, nothing[:, 0]), 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in task.parameters() if parameter.grad is not None)


class Counting:
    """A loader that says how far it was read."""

    def __init__(self, batches: int) -> None:
        self.batches, self.read = batches, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        for batch in range(self.batches):
            self.read += 1
            yield batch


def test_reading_ahead_reads_one_step_and_no_more() -> None:
    loader, counts = Counting(12), deque()
    ahead = ReadAhead(loader, 3, lambda batch: {"items": batch}, counts)
    assert len(ahead) == 12
    read, out, known = [], [], []
    for batch in ahead:
        out.append(batch)
        read.append(loader.read)
        known.append(len(counts))
    assert out == list(range(12))
    assert read == [4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 12, 12]
    assert known == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4]  # the next step's before this one's last micro-batch
    assert [step.mean(3)["items"] for step in counts] == [1.0, 4.0, 7.0, 10.0]


def test_reading_ahead_twice_begins_anew() -> None:
    counts = deque()
    ahead = ReadAhead(Counting(4), 2, lambda batch: {"items": 1}, counts)
    assert next(iter(ahead)) == 0
    assert list(ahead) == [0, 1, 2, 3]
    assert len(counts) == 2


def test_tasks_with_even_micro_batches_read_nothing_ahead() -> None:
    assert not GlobalItems.needed_by(LinearRegression(input_shape=(3,)))
    assert GlobalItems.needed_by(TwoMeans())
