"""A model as transformers saves it: a folder with ``config.json`` and weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lbzoo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "config.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def is_transformers_folder(path: Path) -> bool:
    """Whether transformers' ``from_pretrained`` may read it."""
    return (path / CONFIG_FILE).is_file() and any(any(path.glob(pattern)) for pattern in _WEIGHTS)


def load_transformers_folder(path: Path, module: nn.Module) -> tuple[list[str], list[str]]:
    """Give a task the weights of a folder; returns the names that are (new in it, left out).

    Raises CheckpointError where it is on no model of transformers'.
    """
    load = getattr(module, "load_transformers", None)
    if load is None:
        raise CheckpointError(f"{path} is a model of transformers', which {type(module).__name__} cannot start from")
    new, left_out = load(path)
    return new, left_out
