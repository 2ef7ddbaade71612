"""A sum over the ranks that is begun now and read later, when it is long there."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lbzoo.ranks import has_other_ranks


class RankSum:
    """Adds up ``values`` over all ranks behind the training's back: neither host nor device waits until :meth:`read`.

    Every rank makes one at the same place. The copy to the host is put in line here and not at :meth:`read`, which
    would wait for all that the device was given since.
    """

    def __init__(self, values: Tensor) -> None:
        self._work = dist.all_reduce(values, async_op=True) if has_other_ranks() else None
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            if self._work is not None:
                self._work.wait()  # the device's stream waits, the host goes on
                self._work = None
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = on_host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._values = values

    def read(self) -> list[float]:
        """The sums, the same on every rank."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
