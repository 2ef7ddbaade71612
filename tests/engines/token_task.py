"""A small task on tokens, whose micro-batches hold different numbers of two kinds of item; importable by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from parity_tasks import Tokens
from torch import Tensor, nn

from lbzoo.data.in_memory import TensorSamples
from lbzoo.tasks.base import Task

VOCABULARY, LENGTH, IGNORED = 17, 6, -100


class UnevenTokens(Tokens):
    """Tokens [N, 6], targets [N, 6] of which few are not ignored, and labels [N] of which some are not."""

    def __init__(self, *, num_train: int = 64, num_val: int = 8, empty: bool = False) -> None:
        super().__init__(num_train=num_train, num_val=num_val)
        self.empty = empty

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


class TokenNetwork(nn.Module):
    """Logits of a token for each place [N, 6, 17], and of a label [N, 2]."""

    def __init__(self, width: int, drop_rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(drop_rate)
        self.tokens = nn.Linear(width, VOCABULARY)
        self.label = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.drop(self.norm(F.gelu(self.hidden(self.embedding(tokens)))))
        return self.tokens(hidden), self.label(hidden.mean(dim=1))


class TwoMeans(Task):
    """The mean cross-entropy of the targets, plus that of the labels: two means with denominators of their own."""

    def __init__(self, *, width: int = 8, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.model = TokenNetwork(width, drop_rate)

    def count_items(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, int | Tensor]:
        _, targets, labels = batch
        return {"targets": (targets != IGNORED).sum(), "labels": (labels != IGNORED).sum()}

    def sums(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The cross-entropy of all targets, and of all labels."""
        tokens, targets, labels = batch
        token_logits, label_logits = self.model(tokens)
        of_targets = F.cross_entropy(
            token_logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return of_targets, F.cross_entropy(label_logits, labels, ignore_index=IGNORED, reduction="sum")

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        of_targets, of_labels = self.sums(batch)
        return self.mean_over_items(of_targets, "targets", batch) + self.mean_over_items(of_labels, "labels", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.sums(batch)
