"""The gap: exact accuracies of the fixed part, the module's own metrics, in the validation's weights and precision."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import gap_jobs
import pytest
import torch
from plain_trainer import Plain, adamw, data, fit, scalars, tensorboard
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import MeanMetric

from lbzoo.callbacks.generalization_gap import GeneralizationGap
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.data.loader import Loader
from lbzoo.data.rng import stable_rng
from lbzoo.errors import DataError, UsageError
from lbzoo.tasks.image_classification import ImageClassification
from lbzoo.testing.processes import shared_processes

GAP = "summary/generalization_gap"
EVERY_4 = {"validate": True, "val_check_interval": 4, "check_val_every_n_epoch": None, "max_steps": 12}


def accuracy(module: Any, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((module.model.eval()(x).argmax(1) == y).double().mean())


class Remembers(Plain):
    """Its accuracies on given sets at each validation, computed here."""

    def __init__(self, *sets: tuple[Tensor, Tensor]) -> None:
        super().__init__(adamw)
        self.model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 3))
        self.sets, self.expected = sets, list[list[float]]()

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.expected.append([accuracy(self, x, y) for x, y in self.sets])


def rows(chosen: list[int], samples: int = 48) -> tuple[Tensor, Tensor]:
    x, y = data(samples=samples).dataset.tensors  # type: ignore[attr-defined]  # a TensorDataset
    return x[chosen], y[chosen]


@pytest.mark.parametrize("samples", [20, 1000])
def test_the_gap_is_that_of_the_accuracies(tmp_path: Path, samples: int) -> None:
    chosen = stable_rng(0).permutation(46)[:samples].tolist()
    module = Remembers(rows(chosen, 46), rows(list(range(48))))
    fit(module, GeneralizationGap(samples=samples), logger=tensorboard(tmp_path), loader=data(46), **EVERY_4)
    logged = scalars(tmp_path)
    assert list(logged[GAP]) == [4, 8, 12]
    for step, (train, val) in zip((4, 8, 12), module.expected, strict=True):
        assert logged["train_subset/top1"][step] == pytest.approx(train, abs=1e-7)
        assert logged[GAP][step] == pytest.approx(train - val, abs=1e-6)
    assert logged["train_subset/loss"].keys() == logged[GAP].keys()


def test_results_are_kept_for_who_asks(tmp_path: Path) -> None:
    callback = GeneralizationGap()
    fit(Plain(adamw), callback, **EVERY_4)
    assert callback.validation_results.keys() == {"train_subset/top1", "train_subset/loss", GAP}


def test_the_validation_is_what_it_is_without(tmp_path: Path) -> None:
    """Its metrics, the modes, and the hook that was lent."""
    one, two = Plain(adamw), Plain(adamw)
    fit(one, logger=tensorboard(tmp_path / "one"), **EVERY_4)
    fit(two, GeneralizationGap(), logger=tensorboard(tmp_path / "two"), **EVERY_4)
    logged, with_gap = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert {tag: with_gap[tag] for tag in logged} == logged
    assert two.training
    assert not {"validation_step", "log", "log_dict"} & two.__dict__.keys()


class Images(TensorSamples):
    """Augmentation that would spoil the accuracy."""

    def __getitems__(self, keys: Any) -> tuple[Tensor, ...]:
        images, labels = super().__getitems__(keys)
        return images.flip(0), labels

    def unaugmented(self) -> TensorSamples:
        return TensorSamples(*self.tensors)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_a_task_in_the_precision_of_the_run_without_augmentation(tmp_path: Path, precision: str) -> None:
    class Task(ImageClassification):
        seen: set[torch.dtype]

        def __init__(self) -> None:
            super().__init__(model="cifar_resnet20", num_classes=10, input_shape=(1, 8, 8))
            self.seen = set()

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            assert not self.training
            self.seen.add(self(batch[0]).dtype)
            super().validation_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    loader: DataLoader[Any] = DataLoader(Images(images, labels), batch_size=8, collate_fn=as_batch)  # type: ignore[arg-type]
    task = Task()
    same = DataLoader(TensorSamples(images, labels), batch_size=8, collate_fn=as_batch)  # type: ignore[arg-type,var-annotated]
    task.val_dataloader = lambda: same  # type: ignore[method-assign]
    fit(task, GeneralizationGap(), logger=tensorboard(tmp_path), loader=loader, precision=precision, max_steps=4,
        num_sanity_val_steps=0)  # fmt: skip
    logged = scalars(tmp_path)
    assert logged[GAP][4] == 0.0, "the same images with the same weights"
    assert task.seen == {{"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "64-true": torch.float64}[precision]}


def test_metrics_of_torchmetrics(tmp_path: Path) -> None:
    class WithMetric(Remembers):
        def __init__(self, *sets: tuple[Tensor, Tensor]) -> None:
            super().__init__(*sets)
            self.accuracy = MeanMetric()

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            x, y = batch
            self.accuracy.update((self.model(x).argmax(1) == y).float())
            self.log("val/top1", self.accuracy)

    module = WithMetric(rows(list(range(46)), 46), rows(list(range(48))))
    fit(module, GeneralizationGap(), logger=tensorboard(tmp_path), loader=data(46), **EVERY_4)
    logged = scalars(tmp_path)
    expected = {step: train - val for step, (train, val) in zip((4, 8, 12), module.expected, strict=True)}
    assert logged[GAP] == pytest.approx(expected, abs=1e-6)


def test_a_metric_that_is_not_logged() -> None:
    with pytest.raises(UsageError, match="the module logs no 'val/top2' in validation; did you mean 'val/top1'"):
        fit(Plain(adamw), GeneralizationGap(metric="val/top2"), **EVERY_4)
    with pytest.raises(UsageError, match="samples must be at least 1, not 0"):
        GeneralizationGap(samples=0)


class Broken(TensorDataset):
    """Its row 7 cannot be read."""

    def __getitem__(self, key: int) -> tuple[Tensor, ...]:
        if key == 7:
            raise DataError("cannot read the image 7.jpeg: truncated")
        return super().__getitem__(key)


def test_no_loader_process_outlives_an_error() -> None:
    """The training's ignore SIGTERM, with which Python ends its children at exit: it would wait for them for ever."""

    class Fails(Plain):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            raise RuntimeError("in the part of the training set")

    def through_a_process(samples: Any) -> Loader:
        return Loader(samples, batch_size=4, num_workers=1, persistent_workers=True)

    options: dict[str, Any] = {**EVERY_4, "num_sanity_val_steps": 0, "max_steps": 4}
    before = set(multiprocessing.active_children())
    loader = through_a_process(data().dataset)
    with pytest.raises(RuntimeError, match="in the part of the training set") as caught:
        fit(Fails(adamw), GeneralizationGap(), loader=loader, **options)
    loader.close()  # as the engines do with theirs
    assert set(multiprocessing.active_children()) <= before, "whoever holds the error holds its frames"
    assert caught.traceback
    x, y = rows(list(range(48)))
    broken = through_a_process(Subset(Broken(x, y), [*range(7), *range(8, 48)]))
    broken.dataset.unaugmented = lambda: Broken(x, y)  # type: ignore[attr-defined]  # the training itself does not meet it
    with pytest.raises(DataError, match=r"^cannot read the image 7.jpeg: truncated$"):
        fit(Plain(adamw), GeneralizationGap(), loader=broken, **options)
    broken.close()


@pytest.mark.dist
def test_two_ranks_have_the_numbers_of_one(tmp_path: Path) -> None:
    """25 samples on two ranks: unequal parts."""
    shared_processes().run(2, gap_jobs.train, tmp_path / "two")
    gap_jobs.train(tmp_path / "one")
    two, one = scalars(tmp_path / "two" / "rank0"), scalars(tmp_path / "one" / "rank0")
    assert list(one[GAP]) == [3, 6]
    for tag in (GAP, "train_subset/top1", "train_subset/loss"):
        assert two[tag] == pytest.approx(one[tag], abs=1e-6), tag
    assert len(set(one["train_subset/loss"].values())) == 2
