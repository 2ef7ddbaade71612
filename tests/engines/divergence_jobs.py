"""Runs into which something bad is put: NaN into a sample, into a layer's gradient, on one rank, for some steps.

Importable by worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from fit_jobs import as_if_launched
from torch import Tensor

from lbzoo.data.digits import Digits
from lbzoo.data.in_memory import TensorSamples
from lbzoo.engines import fit
from lbzoo.engines.run_callbacks import MicroBatchSeeds
from lbzoo.errors import DivergedError
from lbzoo.tasks.image_classification import ImageClassification


def fit_with(fault: dict[str, Any] | None, recipe: Path, overrides: list[str], runs: Path, **options: Any) -> Any:
    """(exit code, message) of a run with a fault: ``{"kind": name of a function here, ...its arguments}``."""
    fault = dict(fault or {})
    with ExitStack() as stack:
        stack.enter_context(as_if_launched())
        if fault:
            stack.enter_context(FAULTS[fault.pop("kind")](**fault))
        try:
            result = fit(recipe, overrides, runs=runs, **options)
        except DivergedError as error:
            return error.exit_code, str(error)
        return result.exit_code, result.state


@contextmanager
def bad_sample(index: int) -> Iterator[None]:
    """One sample of the training set is NaN, on whatever rank it falls."""
    original = Digits.train_dataset

    def spoiled(self: Digits, *, seed: int) -> TensorSamples:
        images, labels = original(self, seed=seed).tensors
        images = images.clone()
        images[index] = float("nan")
        return TensorSamples(images, labels)

    with patch.object(Digits, "train_dataset", spoiled):
        yield


@contextmanager
def bad_layer(name: str, steps: list[int], rank: int = 0) -> Iterator[None]:
    """The gradient of one parameter is NaN in some optimizer steps, on one rank before the ranks add theirs up."""

    def spoil(module: Any, step: int) -> None:
        parameter = dict(module.named_parameters())[name]

        handles.append(parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan"))))

    handles: list[Any] = []
    with _at_steps(steps, rank, spoil, lambda: [handle.remove() for handle in handles]):
        yield


@contextmanager
def bad_loss(steps: list[int], rank: int = 0, factor: float = float("nan"), times: int = 1000) -> Iterator[None]:
    """One rank's loss is multiplied by ``factor`` in some optimizer steps, ``times`` times in all."""
    factors = [1.0]
    left = [times]
    original = ImageClassification.training_step

    def training_step(self: Any, *args: Any) -> Tensor:
        return original(self, *args) * factors[0]

    def spoil(module: Any, step: int) -> None:
        if left[0]:
            left[0] -= 1
            factors[0] = factor

    with (
        patch.object(ImageClassification, "training_step", training_step),
        _at_steps(steps, rank, spoil, lambda: factors.__setitem__(0, 1.0)),
    ):
        yield


@contextmanager
def _at_steps(
    steps: list[int], rank: int, begin: Callable[[Any, int], None], end: Callable[[], object]
) -> Iterator[None]:
    """Call ``begin(module, step)`` before the micro-batches of the optimizer steps, and ``end`` before other steps."""
    original = MicroBatchSeeds.on_train_batch_start
    me = dist.get_rank() if dist.is_initialized() else 0

    def hook(self: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        original(self, trainer, module, batch, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches == 0 and me == rank:
            end()
            if trainer.global_step + 1 in steps:
                begin(module, trainer.global_step + 1)

    with patch.object(MicroBatchSeeds, "on_train_batch_start", hook):
        yield


FAULTS: dict[str, Callable[..., Any]] = {"sample": bad_sample, "layer": bad_layer, "loss": bad_loss}
