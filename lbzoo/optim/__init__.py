"""The optimizers of the zoo, and the factory that builds any of them by name. Importing this imports no torch."""

from __future__ import annotations

from lbzoo.optim.factory import create_optimizer, get_optimizer_info, optimizer_options
from lbzoo.optim.info import OptimizerInfo, list_optimizers, register_optimizer, register_optimizer_wrapper
from lbzoo.optim.layer_stats import LayerStats

__all__ = [
    "LayerStats",
    "OptimizerInfo",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "optimizer_options",
    "register_optimizer",
    "register_optimizer_wrapper",
]
