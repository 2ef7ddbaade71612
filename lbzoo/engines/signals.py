"""Stopping a run by signal, at a step that all ranks agree on.

A signal reaches ranks at different moments. A rank that left at once would leave the others waiting in a collective,
so each step's end starts a reduction of the ranks' flags that the next step's end reads: no rank ever waits for it, and
all stop after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import torch
import torch.distributed as dist

from lbzoo.engines.launch import stop_signals
from lbzoo.ranks import has_other_ranks, is_first_rank
from lbzoo.recipe.schema import RequeueSignal

# Seconds within which a second SIGTERM is the first one again: where a launcher is killed, the kernel tells its workers
# once for each of its threads (die_with_parent). A second Ctrl-C is meant at any time.
_SAME_REQUEST = 2.0


class StopRequested(BaseException):
    """The run was asked to stop and its state is saved. Not an Exception: nothing in between may swallow it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class StopSignals:
    """SIGINT, SIGTERM and the scheduler's signal ask for a stop; the second leaves at once, after ``before_leaving``.

    While ``saves`` is False, before a stage's first step, the first one does: there is nothing that is not saved.
    """

    def __init__(self, before_leaving: Callable[[int], None], requeue_signal: RequeueSignal = "SIGUSR1") -> None:
        self._before_leaving = before_leaving
        self.saves = False
        self._handled = stop_signals(requeue_signal)
        self._received, self._received_at = 0, 0.0
        self._previous: dict[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def install(self) -> None:
        """Take the handlers over."""
        for signum in self._handled:
            self._previous.setdefault(signum, signal.getsignal(signum))
            signal.signal(signum, self._handle)

    def restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]  # what getsignal gave
        self._previous.clear()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._received or not self.saves:
            if self._received and signum != signal.SIGINT and time.monotonic() - self._received_at < _SAME_REQUEST:
                return
            try:
                self._before_leaving(signum)
            finally:
                os._exit(128 + signum)
        self._received, self._received_at = signum, time.monotonic()
        if is_first_rank():
            what = "saving a checkpoint and leaving; once more leaves at once"
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, f"\n{signal.Signals(signum).name}: {what}\n".encode())

    def agreed(self) -> int:
        """The signal that all ranks stop for after this optimizer step, or 0. Call it once a step on every rank."""
        if not has_other_ranks():
            return self._received
        agreed = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = int(flag.item())
        if not agreed:
            # On the CPU's back-end, so that no rank synchronises with its GPU.
            flag = torch.tensor([self._received], dtype=torch.int32)
            self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag)
        return agreed
