"""lbzoo: large-batch training for PyTorch.

Layer-wise optimizers that stay right under FSDP2, trust-ratio monitoring, and a zoo of recipes for the tables of four
papers. Every public name is imported on first use, so ``import lbzoo`` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lbzoo.engines import fit as fit
    from lbzoo.errors import LbzooError as LbzooError
    from lbzoo.errors import UsageError as UsageError
    from lbzoo.gsnr import GradientStats as GradientStats
    from lbzoo.optim import LayerStats as LayerStats
    from lbzoo.optim import OptimizerInfo as OptimizerInfo
    from lbzoo.optim import create_optimizer as create_optimizer
    from lbzoo.optim import get_optimizer_info as get_optimizer_info
    from lbzoo.optim import list_optimizers as list_optimizers
    from lbzoo.optim import register_optimizer as register_optimizer
    from lbzoo.registry import register_callback as register_callback
    from lbzoo.registry import register_data as register_data
    from lbzoo.registry import register_schedule as register_schedule
    from lbzoo.registry import register_task as register_task

_HOME = {
    "fit": "lbzoo.engines",
    "LbzooError": "lbzoo.errors",
    "UsageError": "lbzoo.errors",
    "GradientStats": "lbzoo.gsnr",
    "LayerStats": "lbzoo.optim",
    "OptimizerInfo": "lbzoo.optim",
    "create_optimizer": "lbzoo.optim",
    "get_optimizer_info": "lbzoo.optim",
    "list_optimizers": "lbzoo.optim",
    "register_optimizer": "lbzoo.optim",
    "register_callback": "lbzoo.registry",
    "register_data": "lbzoo.registry",
    "register_schedule": "lbzoo.registry",
    "register_task": "lbzoo.registry",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lbzoo' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
