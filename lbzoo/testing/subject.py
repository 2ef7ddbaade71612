"""The optimizer under test: how it is named, found and built."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lbzoo.errors import UsageError, did_you_mean
from lbzoo.registry import optimizers
from lbzoo.signatures import Option, options_of
from lbzoo.testing.known_statistics import KnownStatistics

Factory = Callable[..., Optimizer]
LEARNING_RATE = 0.1  # unless the caller gives one: large, so that what goes wrong shows within a few steps


@dataclass(frozen=True)
class Subject:
    """An optimizer, and the options to check it with.

    ``reference`` is a name that another process can resolve; None for a function that only this process has: its
    checks on several processes are skipped. ``signature`` holds the options that the optimizer takes.
    """

    label: str
    reference: str | None
    factory: Factory
    signature: Mapping[str, Option]
    options: Mapping[str, Any]

    @classmethod
    def resolve(cls, optimizer: str | Factory, options: Mapping[str, Any] | None = None) -> Subject:
        """The subject for a name, a class or a factory ``f(params, **options)``.

        A name is one that ``create_optimizer`` knows (``lamb``, ``timm:lamb``, ``torch:AdamW``,
        ``package.module:Class``), or a file and a name in it: ``./mine.py:Mine`` or, for a registered optimizer,
        ``./mine.py:mine``.
        """
        label = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__qualname__", repr(optimizer))
        reference = optimizer if isinstance(optimizer, str) else importable_name(optimizer)
        factory: Factory
        signature: Mapping[str, Option]
        if reference is None:
            assert not isinstance(optimizer, str)
            factory, signature = partial(_call, optimizer), options_of(optimizer)
        else:
            from lbzoo.recipe.components import component_options

            name = _registry_name(reference)
            factory, signature = partial(_create, name, label), component_options("optimizer", name)
        chosen = dict(options or {})
        if "lr" in signature:
            chosen.setdefault("lr", LEARNING_RATE)
        return cls(label, reference, factory, signature, chosen)

    def build(self, target: nn.Module | Iterable[Mapping[str, Any]], **options: Any) -> Optimizer:
        """The optimizer of a model, or of torch-style groups; ``options`` come on top of the subject's own.

        An optimizer that works on statistics of the gradients is given some.
        """
        optimizer = self.factory(target, **{**self.options, **options})
        attach = getattr(optimizer, "attach_stats", None)
        if attach is not None:
            attach(KnownStatistics())
        return optimizer

    def takes(self, option: str) -> bool:
        """Whether the optimizer has an option of that name."""
        return option in self.signature


def importable_name(component: object) -> str | None:
    """``module:name``, or None for what another process cannot import: lambdas, local functions, the main program."""
    name, module = getattr(component, "__qualname__", ""), getattr(component, "__module__", "__main__")
    importable = module != "__main__" and getattr(sys.modules.get(module), name, None) is component
    return f"{module}:{name}" if importable else None


def _registry_name(reference: str) -> str:
    """The name under which create_optimizer finds ``reference``; a file is imported first."""
    file, colon, name = reference.rpartition(":")
    if reference.endswith(".py"):
        raise UsageError(f"'{reference}' names a file: add the optimizer in it, as in {reference}:Mine")
    if not (colon and file.endswith(".py")):
        return reference
    from lbzoo.recipe.plugins import import_plugin

    path = import_plugin(Path(file))
    module = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == str(path))
    if hasattr(module, name):
        return f"{module.__name__}:{name}"
    if name in optimizers:
        return name
    raise UsageError(f"{file} holds nothing named '{name}'{did_you_mean(name, [*vars(module), *optimizers.names()])}")


def _create(name: str, label: str, target: Any, **options: Any) -> Optimizer:
    from lbzoo.optim import create_optimizer

    try:
        return create_optimizer(target, name, **options)
    except UsageError as error:
        raise UsageError(str(error).replace(name, label)) from error  # a file's module has a name of its own


def _call(factory: Factory, target: Any, **options: Any) -> Optimizer:
    return factory(target.parameters() if isinstance(target, nn.Module) else target, **options)
