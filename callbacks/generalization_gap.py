"""How much better a model is on images that it was trained on: VRGD's table 3.

Tags: ``train_subset/top1`` and whatever else the module logs in validation, but of a fixed part of the training set;
``summary/generalization_gap``, the difference of the two accuracies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Subset
from torchmetrics import Metric

from lbzoo.callbacks.log_values import log_scalars
from lbzoo.callbacks.rank_sum import RankSum
from lbzoo.callbacks.trainer_view import TrainerView, num_train, samples_in
from lbzoo.data.loader import Loader
from lbzoo.data.rng import stable_rng
from lbzoo.data.sampling import EvalSampler
from lbzoo.errors import UsageError, did_you_mean
from lbzoo.registry import register_callback


@register_callback("generalization_gap")
class GeneralizationGap(Callback):
    """Accuracy on a fixed part of the training set, in evaluation mode, minus validation accuracy, at each validation.

    The part goes through the module's own ``validation_step``, in the precision and with the weights of that
    validation, without augmentation where the data set has ``unaugmented()``. It is the same in every run.

    Args:
        samples: how many training samples; all of them where there are fewer.
        metric: what the module logs in validation; the gap is its value in training minus that in validation.
    """

    def __init__(self, *, samples: int = 10_000, metric: str = "val/top1") -> None:
        if samples < 1:
            raise UsageError(f"generalization_gap: samples must be at least 1, not {samples}")
        self.samples, self.metric = samples, metric
        self.validation_results: dict[str, float] = {}
        """What the last validation came to, by tag."""
        self._restore: Callable[[], None] | None = None

    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        """Have the first validation step go over the part of the training set before it does its own work.

        There the weights are those of the validation, and the engine has set precision and modes.
        """
        self.validation_results = {}
        if trainer.sanity_checking or num_train(trainer) is None:
            return
        own = pl_module.__dict__.get("validation_step")  # a wrapper of FSDP's, perhaps
        step = pl_module.validation_step

        def restore() -> None:
            pl_module.__dict__.pop("validation_step", None)
            if own is not None:
                pl_module.__dict__["validation_step"] = own
            self._restore = None

        @functools.wraps(step)
        def after_the_training_set(*args: Any, **kwargs: Any) -> Any:
            restore()
            batch = args[0] if args else kwargs["batch"]
            self.validation_results = self._measure(trainer, pl_module, like=batch)
            return step(*args, **kwargs)

        pl_module.__dict__["validation_step"] = after_the_training_set
        self._restore = restore

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._give_back()
        measured = self.validation_results
        if not measured:
            return
        in_training, in_validation = measured.get(_tag(self.metric)), trainer.callback_metrics.get(self.metric)
        if in_training is None or in_validation is None:
            known = sorted(name for name in trainer.callback_metrics if _tag(name) in measured)
            raise UsageError(
                f"generalization_gap: the module logs no '{self.metric}' in validation"
                f"{did_you_mean(self.metric, known)}"
            )
        measured["summary/generalization_gap"] = in_training - float(in_validation)
        log_scalars(trainer, measured, trainer.global_step)

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back()

    def _give_back(self) -> None:
        if self._restore is not None:
            self._restore()

    def _measure(self, trainer: TrainerView, module: LightningModule, *, like: Any) -> dict[str, float]:
        """What the module's validation logs of the part of the training set, over all ranks. A collective."""
        with _recorded(module) as logged, closing(self._batches(trainer)) as batches:
            for index, batch in enumerate(batches):
                logged.weight = samples_in(batch)
                module.validation_step(_as(like, move_data_to_device(batch, module.device)), index)
            logged.weight = 1
            module.on_validation_epoch_end()
        return {_tag(name): value for name, value in logged.means(module.device).items()}

    def _batches(self, trainer: TrainerView) -> Loader:
        """This rank's part of the samples, in micro-batches, through as many processes as the training's.

        To be closed: these may ignore the signal by which a main process ends its children, as the training's do.
        """
        loader = trainer.train_dataloader
        plain = getattr(loader.dataset, "unaugmented", lambda: loader.dataset)()
        chosen = sorted(stable_rng(0).permutation(len(plain))[: self.samples].tolist())
        sampler = getattr(loader, "batch_sampler", None)
        size = getattr(sampler, "micro_batch_size", None) or getattr(loader, "batch_size", None) or 1
        rank = dist.get_rank() if trainer.world_size > 1 else 0
        workers = getattr(loader, "num_workers", 0)
        return Loader(
            Subset(plain, chosen),
            batch_sampler=EvalSampler(
                num_samples=len(chosen), micro_batch_size=size, rank=rank, world_size=trainer.world_size
            ),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=getattr(loader, "collate_fn", None),
            pin_memory=getattr(loader, "pin_memory", False),
            worker_init_fn=getattr(loader, "worker_init_fn", None),
            generator=torch.Generator(),  # the process's own is the training's
        )


class _Logged:
    """Means of what a module logs, each value weighted by ``weight``, the samples of the batch it belongs to."""

    def __init__(self) -> None:
        self.weight = 1
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._metrics: dict[str, Metric] = {}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        total, weight = self._sums.get(name, (torch.zeros((), dtype=torch.float64), 0.0))
        new = torch.as_tensor(value).detach().double() * self.weight
        self._sums[name] = total.to(new.device) + new, weight + self.weight

    def log_dict(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            self.log(name, value)

    def means(self, device: torch.device) -> dict[str, float]:
        """By name, over all ranks. A collective."""
        for name, metric in self._metrics.items():
            self.log(name, metric.compute())
            metric.reset()
        sums = [total.to(device) for total, _ in self._sums.values()]
        weights = torch.tensor([weight for _, weight in self._sums.values()], dtype=torch.float64, device=device)
        totals = RankSum(torch.cat([torch.stack(sums), weights])).read() if sums else []
        count = len(sums)
        return {name: totals[index] / totals[count + index] for index, name in enumerate(self._sums)}


@contextmanager
def _recorded(module: LightningModule) -> Iterator[_Logged]:
    """What the module logs meanwhile goes into the result and nowhere else."""
    logged = _Logged()
    module.__dict__.update(log=logged.log, log_dict=logged.log_dict)
    try:
        yield logged
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]


def _tag(name: str) -> str:
    return f"train_subset/{name.removeprefix('val/')}"


def _as(like: Any, batch: Any) -> Any:
    """The batch in the floating-point type of another, which the engine has converted to the run's precision."""
    types: list[torch.dtype] = []
    apply_to_collection(like, Tensor, lambda tensor: types.append(tensor.dtype))
    found = next((kind for kind in types if kind.is_floating_point), None)

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(found) if found is not None and tensor.is_floating_point() else tensor

    return apply_to_collection(batch, Tensor, convert)
