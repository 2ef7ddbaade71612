"""The training loss of several steps, without a synchronisation of the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbzoo.callbacks.rank_sum import RankSum


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

    def state(self, device: torch.device) -> dict[str, float]:
        """The sum and the number over all ranks. Collective; waits for the device."""
        total = self._sum if self._sum is not None else torch.zeros((), device=device)
        pair = torch.stack([total.double(), torch.tensor(float(self._count), dtype=torch.float64, device=device)])
        return dict(zip(("sum", "count"), RankSum(pair).read(), strict=True))

    def load_state(self, state: Mapping[str, float], device: torch.device) -> None:
        """Go on from a sum over all ranks; on one of them."""
        self._count = int(state["count"])
        self._sum = torch.tensor(state["sum"], dtype=torch.float32, device=device) if self._count else None

    def take(self) -> tuple[Tensor, int] | None:
        """(sum on the device, number) of the micro-batches' losses since the last ``take``; None where none came."""
        taken = None if self._sum is None else (self._sum, self._count)
        self._sum, self._count = None, 0
        return taken
