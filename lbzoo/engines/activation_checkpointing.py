"""Activation checkpointing: of a layer only the inputs are kept, and the rest is computed anew in the backward pass.

Hooks on the layers, no wrappers: modules and parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.distributed._composable import checkpoint
from torch.nn.modules.batchnorm import _BatchNorm

from lbzoo.engines.layers import unit_layers
from lbzoo.errors import UsageError
from lbzoo.recipe.schema import TrainerSettings
from lbzoo.tasks.base import Task


def checkpoint_activations(task: Task, settings: TrainerSettings) -> None:
    """Checkpoint the task's units if the recipe says so; before the model is wrapped or sharded."""
    if not settings.activation_checkpointing:
        return
    units = unit_layers(task, settings.fsdp.layers if settings.fsdp else None)
    if not units:
        raise UsageError(
            f"trainer.activation_checkpointing: {type(task).__name__} with this model names no layers to compute anew; "
            "with strategy: fsdp, trainer.fsdp.layers can name them"
        )
    for layer in units.values():
        _checkpoint(layer)


def _checkpoint(layer: nn.Module) -> None:
    checkpoint(layer, context_fn=lambda: (nullcontext(), _statistics_counted_once(layer)))


@contextmanager
def _statistics_counted_once(layer: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics have seen the batch in the first forward pass, and do not move in the second."""
    norms = [norm for norm in layer.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
