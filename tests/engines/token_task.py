"""A small task on tokens, whose micro-batches hold different numbers of two kinds of item; importable by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import TensorSamples, as_batch
from lbzoo.tasks.base import Task

VOCABULARY, LENGTH, IGNORED = 17, 6, -100


class UnevenTokens(DataSource):
    """Tokens [N, 6], targets [N, 6] of which few are not ignored, and labels [N] of which some are not."""

    in_memory = True
    preshuffled = True
    collate = staticmethod(as_batch)

    def __init__(self, *, num_train: int = 64, num_val: int = 8, empty: bool = False) -> None:
        self.sizes, self.empty = (num_train, num_val), empty

    def facts(self) -> DataFacts:
        return DataFacts(*self.sizes, unit="sequences")

    def prepare(self) -> None:
        """Nothing can be missing."""

    def train_dataset(self, *, seed: int = 0) -> TensorSamples:
        return self._draw(self.sizes[0], 1)

    def val_dataset(self) -> TensorSamples:
        return self._draw(self.sizes[1], 2)

    def _draw(self, size: int, seed: int) -> TensorSamples:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
        targets = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
        # Whole stretches of the data have no item at all, others many: samples are taken in order within a shard.
        share = torch.linspace(-0.3, 0.9, size)[:, None] if not self.empty else torch.zeros(size, 1)
        targets[torch.rand(size, LENGTH, generator=generator) >= share] = IGNORED
        labels = torch.randint(2, (size,), generator=generator)
        labels[torch.rand(size, generator=generator) >= 0.3] = IGNORED
        return TensorSamples(tokens, targets, labels)


class TwoMeans(Task):
    """The mean cross-entropy of the targets, plus that of the labels: two means with denominators of their own."""

    def __init__(self, *, width: int = 8) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embedding": nn.Embedding(VOCABULARY, width),
                "norm": nn.LayerNorm(width),
                "tokens": nn.Linear(width, VOCABULARY),
                "pair": nn.Linear(width, 2),
            }
        )

    def count_items(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, int | Tensor]:
        _, targets, labels = batch
        return {"targets": (targets != IGNORED).sum(), "labels": (labels != IGNORED).sum()}

    def sums(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The cross-entropy of all targets, and of all labels."""
        tokens, targets, labels = batch
        hidden = self.model["norm"](self.model["embedding"](tokens))
        logits = self.model["tokens"](hidden).flatten(0, 1)
        of_targets = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        pairs = self.model["pair"](hidden.mean(dim=1))
        return of_targets, F.cross_entropy(pairs, labels, ignore_index=IGNORED, reduction="sum")

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        of_targets, of_labels = self.sums(batch)
        return self.mean_over_items(of_targets, "targets", batch) + self.mean_over_items(of_labels, "labels", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Nothing is measured."""
