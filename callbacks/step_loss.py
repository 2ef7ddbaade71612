"""The training loss of several steps, without a synchronisation of the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class LossSum:
    """Adds up what ``on_train_batch_end`` receives, on the device, until it is read."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, outputs: Any, accumulate_grad_batches: int) -> None:
        """``outputs``: a micro-batch's; its loss comes divided by ``accumulate_grad_batches``. None: it was skipped."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            whole = loss.detach().float() * accumulate_grad_batches
            self._sum = whole if self._sum is None else self._sum + whole
            self._count += 1

    def take(self) -> tuple[Tensor, int] | None:
        """(sum on the device, number) of the micro-batches' losses since the last ``take``; None where none came."""
        taken = None if self._sum is None else (self._sum, self._count)
        self._sum, self._count = None, 0
        return taken
