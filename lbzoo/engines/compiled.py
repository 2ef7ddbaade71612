"""``trainer.compile``: the model's forward and backward pass through torch.compile, with the numbers of eager mode.

The network that a task calls, its ``model``, is compiled in place, after it was wrapped or sharded: parameters keep
their names, and checkpoints do not know of it. What a task does around its network stays eager.

Validation is eager as well. Its batches differ by a sample (``EvalSampler``) and it keeps no gradients, each of which
would be one more compilation, of minutes for a large model.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lbzoo.callbacks.trainer_view import TrainerView
from lbzoo.errors import UsageError
from lbzoo.recipe import CompileMode


class CompileModel(Callback):
    """Compiles the ``model`` of a task when it stands as it will be trained. ``mode``: torch.compile's, or True."""

    def __init__(self, mode: CompileMode) -> None:
        self._mode = mode

    def on_fit_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        network = _network(pl_module)
        options = _options(self._mode)
        _try_out(options, pl_module.device)
        network.compile(options=options)

    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        torch.compiler.set_stance("default")

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        torch.compiler.set_stance("default")


def _network(task: LightningModule) -> nn.Module:
    """What is compiled. A module without a forward pass would be compiled to nothing, and nobody would know."""
    network = getattr(task, "model", None)
    if isinstance(network, nn.Module) and type(network).forward is not nn.Module.forward:
        return network
    what = "has no module 'model'" if not isinstance(network, nn.Module) else "calls parts of its 'model', not itself"
    raise UsageError(f"trainer.compile compiles the network that a task calls; {type(task).__name__} {what}")


def _options(mode: CompileMode) -> dict[str, Any]:
    """Dropout draws from torch's generators as it does in eager mode: the same numbers for the same seed."""
    of_mode = {} if mode is True else torch._inductor.list_mode_options(mode)
    return {**of_mode, "fallback_random": True}


def _try_out(options: dict[str, Any], device: torch.device) -> None:
    """Compile next to nothing: whether a compiler is there, and works, is known before the first step.

    Raises UsageError with the compiler's own words.
    """
    try:
        torch.compile(lambda x: x * 2 + 1, options=options)(torch.ones(4, device=device))
    except Exception as error:
        needs = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise UsageError(
            f"trainer.compile does not work here: {_gist(error)}. torch.compile needs {needs} (the variables CXX and "
            "CC say which, g++ and gcc by default) and Python's header files; or leave trainer.compile out"
        ) from error


def _gist(error: Exception) -> str:
    """The first line that says what happened; torch puts a page of advice below it."""
    cause: BaseException = getattr(error, "inner_exception", error)
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
