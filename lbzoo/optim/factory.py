"""Any optimizer by its name.

A name is a registered one (``lamb``, ``larc_novograd``), ``timm:NAME``, ``torch:CLASS`` or ``package.module:Class``.
All take parameter rules, and all refuse options and group keys that they would otherwise ignore. Imports torch only
where an optimizer is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lbzoo import registry
from lbzoo.errors import UnknownNameError, UsageError, did_you_mean, import_hint
from lbzoo.optim.info import OptimizerInfo, canonical_name
from lbzoo.param_groups import COMMON_OPTIONS, build_param_groups
from lbzoo.signatures import REQUIRED, Option, options_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lbzoo.param_groups import Rule, Target


def create_optimizer(target: Target, name: str, *, param_rules: Sequence[Rule] = (), **options: Any) -> Optimizer:
    """Build the optimizer ``name``.

    ``target``: a module, named parameters, parameters, or torch-style parameter groups. ``param_rules``: see
    :mod:`lbzoo.param_groups`. Where names are known the groups carry them as ``param_names``. Raises UsageError for an
    unknown name, an option or group key that the optimizer does not take, a value out of range, and a parameter that
    is given twice.
    """
    import torch

    known = optimizer_options(name)
    _check_options(name, options, known)
    groups = build_param_groups(target, param_rules, options=known)
    given_keys = {key for group in groups for key in group}
    try:
        optimizer = _component(name)(groups, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer '{name}': {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer '{name}' gives a {type(optimizer).__name__}, which is no torch.optim.Optimizer")
    _refuse_ignored_keys(name, given_keys, optimizer)
    _apply_lr_scale(optimizer)
    return optimizer


def optimizer_options(name: str) -> dict[str, Option]:
    """The options that ``name`` takes, by name. Those of registered optimizers are read without importing torch."""
    name = canonical_name(name)
    if ":" not in name:
        return dict(registry.optimizers.options(name))
    foreign = _foreign(name)
    options = options_of(foreign.component)
    return {key: replace(option, default=foreign.defaults.get(key, option.default)) for key, option in options.items()}


def get_optimizer_info(name: str) -> OptimizerInfo:
    """What is known of an optimizer; of a foreign one: its description and defaults. Raises UnknownNameError."""
    name = canonical_name(name)
    defaults = {
        key: option.default for key, option in optimizer_options(name).items() if option.default is not REQUIRED
    }
    if ":" in name:
        return OptimizerInfo(name=name, description=_foreign(name).description, defaults=defaults)
    entry = registry.optimizers.entry(name)
    # An entry point of another package says what it is only when it is imported.
    meta = entry.meta if entry.options is not None else registry.optimizers.meta(name)
    return OptimizerInfo(name=name, description=entry.first_line, defaults=defaults, **meta)


def _check_options(name: str, given: Mapping[str, Any], known: Mapping[str, Option]) -> None:
    mistakes = [
        f"optimizer '{name}' takes no option '{key}'{did_you_mean(key, known)}" for key in given if key not in known
    ]
    missing = [key for key, option in known.items() if option.default is REQUIRED and key not in given]
    mistakes += [f"optimizer '{name}' needs the option '{key}'" for key in missing]
    if mistakes:
        raise UsageError("\n".join(mistakes))


def _refuse_ignored_keys(name: str, given: Collection[str], optimizer: Optimizer) -> None:
    """A key that the constructor takes, but that is no group option, would lie in the group without effect."""
    for key in given:
        if key not in {"params", "param_names", *COMMON_OPTIONS, *optimizer.defaults}:
            raise UsageError(f"optimizer '{name}' cannot have a '{key}' of its own for some parameters")


def _apply_lr_scale(optimizer: Optimizer) -> None:
    if any("lr_scale" in group for group in optimizer.param_groups):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.setdefault("lr_scale", 1.0)


@dataclass(frozen=True)
class _Foreign:
    component: Callable[..., Any]
    description: str
    defaults: Mapping[str, Any]


def _component(name: str) -> Callable[..., Any]:
    name = canonical_name(name)
    if ":" not in name:
        component: Callable[..., Any] = registry.optimizers.get(name)
        return component
    foreign = _foreign(name)

    def build(groups: Any, **options: Any) -> Any:
        return foreign.component(groups, **{**foreign.defaults, **options})

    return build


def _foreign(name: str) -> _Foreign:
    package, _, attribute = name.partition(":")
    if package == "timm":
        return _timm(attribute)
    module = _import(package if package != "torch" else "torch.optim", name)
    component = getattr(module, attribute, None)
    if not callable(component):
        from torch.optim import Optimizer

        classes = [
            key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Optimizer)
        ]
        raise UnknownNameError(f"optimizer in {module.__name__}", attribute, set(classes) - {"Optimizer"})
    return _Foreign(component, (inspect.getdoc(component) or "").partition("\n")[0], {})


def _timm(name: str) -> _Foreign:
    timm_optim = _import("timm.optim", f"timm:{name}")
    if name not in timm_optim.list_optimizers():
        raise UnknownNameError("timm optimizer", name, timm_optim.list_optimizers())
    info = timm_optim.get_optimizer_info(name)
    component = timm_optim.get_optimizer_class(name, bind_defaults=False)
    return _Foreign(component, info.description, dict(info.defaults or {}))


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = "; install it with: pip install 'lbzoo[vision]'" if module.startswith("timm") else import_hint(module)
        raise UsageError(f"optimizer '{name}': cannot import {module} ({error}){hint}") from error
