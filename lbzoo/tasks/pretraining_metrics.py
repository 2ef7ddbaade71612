"""Validation metrics of BERT's pretraining, exact over ranks with parts of different size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lbzoo.data.masked_pairs import IGNORED


class PretrainingMetrics(Metric):
    """Of masked tokens: mean cross-entropy, perplexity and accuracy. Of pairs: mean cross-entropy and accuracy.

    Keeps sums and counts: neither a mean of batches' means nor of their perplexities would be right.
    """

    full_state_update = False

    mlm_loss: Tensor
    mlm_correct: Tensor
    masked: Tensor
    nsp_loss: Tensor
    nsp_correct: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mlm_loss", "nsp_loss"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("mlm_correct", "masked", "nsp_correct", "pairs"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mlm_logits: Tensor, labels: Tensor, nsp_logits: Tensor, next_sentence: Tensor) -> None:
        """Take in a batch: logits [N, P, vocabulary] and labels [N, P] of places, [N, 2] and [N] of pairs."""
        logits, targets = mlm_logits.flatten(0, 1).float(), labels.flatten()
        self.mlm_loss += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        self.mlm_correct += (logits.argmax(dim=1) == targets).sum()
        self.masked += (targets != IGNORED).sum()
        self.nsp_loss += F.cross_entropy(nsp_logits.float(), next_sentence, reduction="sum")
        self.nsp_correct += (nsp_logits.argmax(dim=1) == next_sentence).sum()
        self.pairs += len(next_sentence)

    def compute(self) -> dict[str, Tensor]:
        """Accuracies are fractions; ``loss`` is the sum of the two, as in training."""
        mlm, nsp = self.mlm_loss / self.masked.clamp(min=1), self.nsp_loss / self.pairs
        return {
            "loss": mlm + nsp,
            "mlm_loss": mlm,
            "mlm_perplexity": mlm.exp(),
            "mlm_accuracy": self.mlm_correct / self.masked.clamp(min=1),
            "nsp_loss": nsp,
            "nsp_accuracy": self.nsp_correct / self.pairs,
        }
