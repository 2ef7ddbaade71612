"""What a module logs with ``self.log`` in a loop that is not Lightning's.

The values are kept, reduced and named by Lightning's own collection, so that ``on_step``, ``on_epoch``, ``reduce_fx``,
``sync_dist``, ``batch_size`` and torchmetrics objects mean what they mean in a Trainer. When they are passed on to the
loggers is Lightning's rule as well: training values at each step that ``every`` divides and at the last one, those of a
validation after it, and those of a stage at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor


class LoggedValues:
    """The collections of training and validation, and the newest value of everything.

    Takes the place of a Trainer's logger connector, of which ``LightningModule.log`` uses :meth:`should_reset_tensors`
    and ``_current_fx``.
    """

    def __init__(self, loggers: Sequence[Logger], *, every: int) -> None:
        self._loggers, self._every = loggers, every
        self._of_training, self._of_validation = _ResultCollection(training=True), _ResultCollection(training=False)
        self._results = self._of_training
        self._current_fx: str | None = None  # the hook that logged last
        self._is_first_batch: bool | None = None  # None outside of the batches of an epoch
        self._newest: dict[str, dict[str, Any]] = {"callback": {}, "log": {}, "pbar": {}}

    @property
    def results(self) -> _ResultCollection:
        """What ``self.log`` adds to."""
        return self._results

    def newest(self, kind: str) -> dict[str, Any]:
        """``callback``, ``log`` or ``pbar``: by name, those of the running batch or epoch included."""
        self._update()
        return self._newest[kind]

    def should_reset_tensors(self, fx: str) -> bool:
        """Whether values of hook ``fx`` are of an earlier epoch."""
        return self._current_fx != fx and self._is_first_batch in (None, True)

    def begin_batch(self, batch: Any) -> None:
        self._is_first_batch = self._is_first_batch is None
        self._results.batch, self._results.batch_size, self._results.dataloader_idx = batch, None, None

    def end_batch(self) -> None:
        if self._results:
            self._update()
        self._results.batch, self._results.batch_size = None, None

    def log_step(self, step: int, *, is_last: bool) -> None:
        """Pass the values of optimizer step ``step`` on, if it is a logged one."""
        if self._results and (is_last or step % self._every == 0):
            self._log(self._values()["log"], step)

    def log_validation_batch(self, batch_idx: int) -> None:
        """Pass on what was logged with ``on_step`` in a validation."""
        if self._results:
            self._log(self._values()["log"], batch_idx)

    def end_epoch(self, call_hooks: Callable[[], None]) -> dict[str, Tensor]:
        """``call_hooks``, which may log, and the reduced values of the epoch."""
        self._is_first_batch = None
        self._update()
        self._results.dataloader_idx = None
        call_hooks()
        self._update()
        self._current_fx = None
        return dict(self._values()["log"])

    def log_epoch(self, values: dict[str, Tensor], step: int) -> None:
        self._log(values, step)

    def reset(self) -> None:
        """Forget the epoch."""
        self._results.reset()
        self._is_first_batch = self._current_fx = None

    def begin_validation(self) -> bool | None:
        """Collect for a validation until :meth:`end_validation`, which takes what this returns."""
        interrupted, self._is_first_batch = self._is_first_batch, None
        self._results = self._of_validation
        return interrupted

    def end_validation(self, interrupted: bool | None) -> None:
        self.reset()
        self._results, self._is_first_batch = self._of_training, interrupted

    def _values(self) -> Any:
        return self._results.metrics(self._is_first_batch is not None)

    def _update(self) -> None:
        if self._results:
            for kind, values in self._values().items():
                self._newest[kind].update(values)

    def _log(self, values: dict[str, Tensor], step: int) -> None:
        if values:
            scalars = convert_tensors_to_scalars(values)
            for logger in self._loggers:
                logger.log_metrics(metrics=scalars, step=step)
                logger.save()
