"""Checkpoints: one format for every engine and layout.

A checkpoint is a directory ``step_00000120/`` written by ``torch.distributed.checkpoint`` (model and optimizer by
parameter name, without wrapper prefixes) with a ``state.json`` that says where the run stood. It is written beside its
final name and renamed, so a directory under its final name is always whole.
"""

from lbzoo.checkpoint.folder import CheckpointFolder, read_state, resolve_checkpoint, validates_averages
from lbzoo.checkpoint.format import (
    load_callbacks,
    load_checkpoint,
    load_optimizer,
    load_weights,
    names_in_common,
    shapes,
)
from lbzoo.checkpoint.saving import BackgroundSaver, Content, content_of, save_checkpoint, write

__all__ = [
    "BackgroundSaver",
    "CheckpointFolder",
    "Content",
    "content_of",
    "load_callbacks",
    "load_checkpoint",
    "load_optimizer",
    "load_weights",
    "names_in_common",
    "read_state",
    "resolve_checkpoint",
    "save_checkpoint",
    "shapes",
    "validates_averages",
    "write",
]
