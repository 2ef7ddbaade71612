"""Writing numbers to whatever loggers a trainer has, and to TensorBoard at a cost that does not grow with the layers.

``self.log_dict`` takes 0.2 ms a value, so that 161 layers cost as much as a training step (benchmarks/monitoring.py).
TensorBoard's file format takes any number of values in one event; that is what :func:`log_scalars` and
:func:`log_layers` write. Every other Lightning logger gets a plain dictionary.

All functions do nothing on ranks other than the first, and take ``step``, the optimizer step that the values belong to.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lbzoo.callbacks.trainer_view import TrainerView

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One chart of TensorBoard's custom-scalar page: its kind and the tags it shows. A margin chart takes three tags: the
# line and its two bounds; a multi-line chart takes regular expressions.
Chart = tuple[Literal["Multiline", "Margin"], list[str]]
Layout = Mapping[str, Mapping[str, Chart]]

_layouts: weakref.WeakKeyDictionary[SummaryWriter, dict[str, dict[str, Chart]]] = weakref.WeakKeyDictionary()


def log_scalars(trainer: TrainerView, values: Mapping[str, float | Tensor], step: int) -> None:
    """Log ``{tag: value}`` to every logger, TensorBoard in one event."""
    if trainer.is_global_zero:
        scalars = {tag: float(value) for tag, value in values.items()}
        for logger in trainer.loggers:
            _log_flat(logger, scalars, step)


def log_layers(
    trainer: TrainerView,
    values: Mapping[str, tuple[Sequence[str], Tensor]],
    step: int,
    scalars: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Log ``{prefix: (layer names, tensor [L])}`` as tags ``prefix/layer``, with one copy to the host.

    ``scalars``: ``{tag: value}`` that go into the same event. Loggers with a true attribute ``skips_layers`` get only
    these: in a file that people read, hundreds of keys a step would bury the rest.
    """
    if not trainer.is_global_zero:
        return
    tags = [f"{prefix}/{name}" for prefix, (names, _) in values.items() for name in names]
    tensors = [tensor.detach().reshape(-1) for _, tensor in values.values()]
    numbers = torch.cat(tensors).tolist() if tensors else []
    everything = {**scalars, **dict(zip(tags, numbers, strict=True))}
    for logger in trainer.loggers:
        _log_flat(logger, scalars if getattr(logger, "skips_layers", False) else everything, step)


def log_histogram(trainer: TrainerView, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
    """A histogram in buckets of a tenth, for TensorBoard; values that are not finite are left out."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return
    low, high = math.floor(finite.min() * 10), math.floor(finite.max() * 10) + 1
    edges = np.linspace(low, high, min(high - low, 1000) + 1) / 10
    counts, _ = np.histogram(finite, edges)
    for writer, prefix in _tensorboard_writers(trainer):
        writer.add_histogram_raw(
            prefix + tag,
            min=float(finite.min()),
            max=float(finite.max()),
            num=finite.size,
            sum=float(finite.sum()),
            sum_squares=float(np.square(finite).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def log_image(trainer: TrainerView, tag: str, image_HWC: NDArray[np.uint8], step: int) -> None:
    """An RGB image, for TensorBoard."""
    for writer, prefix in _tensorboard_writers(trainer):
        writer.add_image(prefix + tag, image_HWC, step, dataformats="HWC")


def log_layout(trainer: TrainerView, layout: Layout) -> None:
    """Add ``{category: {chart title: chart}}`` to TensorBoard's custom-scalar page.

    TensorBoard shows the last layout of a run only, so what other callbacks of the run asked for is written again.
    """
    for writer, prefix in _tensorboard_writers(trainer):
        whole = _layouts.setdefault(writer, {})
        for category, charts in layout.items():
            whole.setdefault(category, {}).update({title: _prefixed(chart, prefix) for title, chart in charts.items()})
        writer.add_custom_scalars(whole)


def _log_flat(logger: Logger, values: Mapping[str, float], step: int) -> None:
    if not values:
        return
    if not isinstance(logger, TensorBoardLogger) or not _write_event(logger.experiment, _prefix(logger), values, step):
        logger.log_metrics(dict(values), step)


def _write_event(writer: SummaryWriter, prefix: str, values: Mapping[str, float], step: int) -> bool:
    """One event with all values. False where the writer is not torch's, or has lost the private method used here."""
    file_writer = getattr(writer, "_get_file_writer", None)
    if file_writer is None or not isinstance(writer, SummaryWriter):
        return False
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]  # ships no types

    event = [Summary.Value(tag=prefix + tag, simple_value=value) for tag, value in values.items()]
    file_writer().add_summary(Summary(value=event), step)
    return True


def _tensorboard_writers(trainer: TrainerView) -> Iterator[tuple[SummaryWriter, str]]:
    """torch's writer, and the prefix of all tags, of each TensorBoard logger; none but on the first rank."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and isinstance(logger.experiment, SummaryWriter):
                yield logger.experiment, _prefix(logger)


def _prefixed(chart: Chart, prefix: str) -> Chart:
    kind, tags = chart
    return kind, [(re.escape(prefix) if kind == "Multiline" else prefix) + tag for tag in tags]


def _prefix(logger: TensorBoardLogger) -> str:
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
