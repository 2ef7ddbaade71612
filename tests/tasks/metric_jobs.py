"""Jobs for the processes of test_image_classification.py; apart from it, so that they import little."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lbzoo.tasks.classification_metrics import ClassificationMetrics

PARTS = [slice(0, 3), slice(3, 10)]


def samples() -> tuple[Tensor, Tensor]:
    """Logits and labels of ten samples in ten classes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(10, 10, generator=generator), torch.randint(10, (10,), generator=generator)


def metrics_of_uneven_ranks() -> dict[str, float]:
    """What each rank computes of the whole, having seen its own part."""
    logits, labels = samples()
    part = PARTS[dist.get_rank()]
    metrics = ClassificationMetrics(10)
    metrics.update(logits[part], labels[part])
    return {name: value.item() for name, value in metrics.compute().items()}
