"""The items (tokens, masked positions) of a whole global batch, known before its first micro-batch is trained on.

A mean over the global batch needs its number of items, which no micro-batch knows. So the micro-batches of a step are
read ahead by a whole step: while one step is trained, those of the next are fetched and counted on the CPU, and the
ranks add up their counts behind the step's back. The device is never read. A step's micro-batches wait in memory.

Scaling the summed gradients afterwards would need no reading ahead, but has one factor for all of them; BERT's loss
is a mean over masked positions plus a mean over pairs of sentences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from lbzoo.callbacks.trainer_view import TrainerView
from lbzoo.data.base import Samples
from lbzoo.data.loader import Loader
from lbzoo.ranks import has_other_ranks
from lbzoo.tasks.base import Task

CountItems = Callable[[Any], Mapping[str, int | Tensor]]


class GlobalItems(Callback):
    """Tells ``task`` before each step how many items its micro-batches hold on average over all ranks.

    ``micro_batches``: of one rank in a step. The training loader has to be :meth:`read_ahead`'s.
    """

    def __init__(self, micro_batches: int, task: Task) -> None:
        self._micro_batches, self._task = micro_batches, task
        self._coming: deque[_Counts] = deque()  # of the steps that were read, in order

    @staticmethod
    def needed_by(task: Task) -> bool:
        """Whether the task counts items at all."""
        return type(task).count_items is not Task.count_items

    def read_ahead(self, loader: Loader) -> ReadAhead:
        return ReadAhead(loader, self._micro_batches, self._task.count_items, self._coming)

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self._micro_batches == 0:
            self._task.items_per_micro_batch = self._coming.popleft().mean(self._micro_batches * trainer.world_size)

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self._task.items_per_micro_batch = None


class ReadAhead:
    """A loader that reads a step ahead; ``counts`` gets those of a step before its first micro-batch comes out."""

    def __init__(self, loader: Loader, micro_batches: int, count_items: CountItems, counts: deque[_Counts]) -> None:
        self._loader, self._micro_batches = loader, micro_batches
        self._count_items, self._counts = count_items, counts

    @property
    def dataset(self) -> Samples:
        dataset: Samples = self._loader.dataset  # type: ignore[assignment]  # torch names what it takes, not what it has
        return dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._counts.clear()
        batches = iter(self._loader)
        coming = deque(islice(batches, self._micro_batches))
        self._count(coming)
        while coming:
            step, coming = coming, deque()
            while step:
                coming.extend(islice(batches, 1))
                if len(step) == 1:  # the ranks have the time of this micro-batch to add up their counts
                    self._count(coming)
                yield step.popleft()

    def _count(self, step: Iterable[Any]) -> None:
        if of_micro_batches := [self._count_items(batch) for batch in step]:
            self._counts.append(_Counts(of_micro_batches))


class _Counts:
    """The items of one step's micro-batches, being added up over the ranks on the CPU's back-end."""

    def __init__(self, of_micro_batches: list[Mapping[str, int | Tensor]]) -> None:
        self._kinds = list(of_micro_batches[0])
        rows = [[int(counts[kind]) for kind in self._kinds] for counts in of_micro_batches]
        self._totals = torch.tensor(rows, dtype=torch.int64).sum(dim=0)
        self._work = dist.all_reduce(self._totals, async_op=True) if has_other_ranks() else None

    def mean(self, micro_batches: int) -> dict[str, float]:
        """By kind, over all micro-batches of all ranks."""
        if self._work is not None:
            self._work.wait()
        return dict(zip(self._kinds, (self._totals.double() / micro_batches).tolist(), strict=True))
