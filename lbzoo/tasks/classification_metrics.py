"""Validation metrics of a classifier, exact over ranks with parts of different size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

TOP_K = 5


class ClassificationMetrics(Metric):
    """Mean cross-entropy, top-1 and, for more than five classes, top-5 accuracy over samples (a micro average).

    Keeps sums over samples, which torchmetrics adds up over ranks: a mean of the ranks' means would be wrong where they
    hold different numbers of samples.
    """

    full_state_update = False

    loss_sum: Tensor
    correct: Tensor
    correct_in_top_k: Tensor
    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.has_top_k = num_classes > TOP_K
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("correct", "correct_in_top_k", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits [N, classes], labels [N]."""
        self.loss_sum += F.cross_entropy(logits.double(), labels, reduction="sum")
        self.correct += (logits.argmax(dim=1) == labels).sum()
        if self.has_top_k:
            self.correct_in_top_k += (logits.topk(TOP_K, dim=1).indices == labels[:, None]).sum()
        self.count += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """``loss``, ``top1`` and perhaps ``top5``, the accuracies as fractions."""
        metrics = {"loss": self.loss_sum / self.count, "top1": self.correct / self.count}
        if self.has_top_k:
            metrics["top5"] = self.correct_in_top_k / self.count
        return metrics
