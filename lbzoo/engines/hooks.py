"""Calling the hooks of callbacks and of the module, in Lightning's order: callbacks first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from lbzoo.engines.loop_trainer import LoopTrainer


class Hooks:
    """A callback that does not override a hook is not called for it, which keeps hooks out of a step's time."""

    def __init__(self, trainer: LoopTrainer, module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> None:
        self._trainer, self._module, self._callbacks = trainer, module, callbacks
        self._by_name: dict[str, list[Callable[..., Any]]] = {}

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The callbacks' hooks of this name, then the module's, whose result is returned."""
        self.of_callbacks(name, *args, **kwargs)
        return self.of_module(name, *args, **kwargs)

    def of_callbacks(self, name: str, *args: Any, **kwargs: Any) -> None:
        overridden = self._by_name.get(name)
        if overridden is None:
            found = [getattr(callback, name) for callback in self._callbacks]
            default = getattr(pl.Callback, name)
            overridden = [hook for hook in found if getattr(hook, "__func__", hook) is not default]
            self._by_name[name] = overridden
        if overridden:
            module = self._module
            outer, module._current_fx_name = module._current_fx_name, name  # what self.log asks for
            for hook in overridden:
                hook(self._trainer, module, *args, **kwargs)
            module._current_fx_name = outer

    def of_module(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        outer, module._current_fx_name = module._current_fx_name, name
        result = getattr(module, name)(*args, **kwargs)
        module._current_fx_name = outer
        return result
