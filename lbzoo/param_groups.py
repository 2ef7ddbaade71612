"""Parameter groups from rules: options that differ by parameter name or number of dimensions.

A rule is a mapping: ``match`` (a glob on the parameter's name, or several) and ``ndim`` (a number of dimensions, or
several) say which parameters it is for, both together where both are given; everything else in it is a group option::

    {"match": ["*.bias", "*norm*"], "weight_decay": 0.0, "adapt": False}
    {"match": "backbone.*", "lr_scale": 0.1}

Where several rules match a parameter, the later wins, key by key. ``lr_scale`` multiplies the learning rate at
creation and stays in the group.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lbzoo.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    Target: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

Rule: TypeAlias = Mapping[str, Any]

SELECTORS = ("match", "ndim")
# Group keys that every optimizer may carry: the learning-rate factor, and the label that learning-rate monitors print.
COMMON_OPTIONS = ("lr_scale", "name")


@dataclass(frozen=True)
class _Given:
    """A parameter as the caller gave it. ``options``: those of its torch-style group, ``group`` that group's index."""

    name: str | None
    tensor: Tensor
    group: int
    options: Mapping[str, Any]


def build_param_groups(
    target: Target, rules: Sequence[Rule] = (), *, options: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Torch-style groups, with ``param_names`` where all parameters have names.

    ``target``: a module, named parameters, parameters, or torch-style groups, whose own options a rule overrides.
    ``options``: the option names that the optimizer takes, for the check of the keys. A rule that matches no parameter
    is a warning. Raises UsageError for rules and keys that mean nothing, and for a parameter that is given twice.
    """
    if options is not None:
        check_rules(rules, options)
    given = _flatten(target)
    if options is not None:
        for index, own in {item.group: item.options for item in given}.items():
            _check_keys(own, options, f"parameter group {index}")
    _refuse_duplicates(given)
    matched = [False] * len(rules)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    named = all(item.name is not None for item in given)
    for item in given:
        resolved = dict(item.options)
        for index, rule in enumerate(rules):
            if _matches(rule, item, index):
                matched[index] = True
                resolved.update({key: value for key, value in rule.items() if key not in SELECTORS})
        identity = (item.group, *sorted((key, repr(value)) for key, value in resolved.items()))
        group = groups.setdefault(identity, {"params": [], **({"param_names": []} if named else {}), **resolved})
        group["params"].append(item.tensor)
        if named:
            group["param_names"].append(item.name)
    for rule, hit in zip(rules, matched, strict=True):
        if not hit:
            warnings.warn(f"param_rules: no parameter matches {_selector_text(rule)}", UserWarning, stacklevel=3)
    return list(groups.values())


def check_rules(rules: Sequence[Rule], options: Collection[str]) -> None:
    """Raise UsageError, listing every mistake, unless the rules select something and set options that exist."""
    mistakes = []
    for index, rule in enumerate(rules):
        where = f"param_rules[{index}]"
        try:
            if not isinstance(rule, Mapping):
                raise UsageError(f"{where}: a rule is a mapping, not {type(rule).__name__}")
            _check_selectors(rule, where)
            _check_keys({key: value for key, value in rule.items() if key not in SELECTORS}, options, where)
        except UsageError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UsageError("\n".join(mistakes))


def _check_selectors(rule: Rule, where: str) -> None:
    if not any(key in rule for key in SELECTORS):
        raise UsageError(f"{where}: says neither 'match' nor 'ndim': set the option of the optimizer itself instead")
    for key, kind in (("match", str), ("ndim", int)):
        values = _as_list(rule.get(key, []))
        if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
            raise UsageError(f"{where}.{key}: expected {kind.__name__} or a list of them, got {rule[key]!r}")
    if set(rule) <= set(SELECTORS):
        raise UsageError(f"{where}: sets no option")


def _check_keys(given: Mapping[str, Any], options: Collection[str], where: str) -> None:
    known = {*options, *COMMON_OPTIONS}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError("\n".join(f"{where}: no option '{key}'{did_you_mean(str(key), known)}" for key in unknown))
    scale = given.get("lr_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
        raise UsageError(f"{where}.lr_scale: expected a factor of 0 or more, got {scale!r}")


def _flatten(target: Target) -> list[_Given]:
    import torch

    if isinstance(target, torch.nn.Module):
        return [_Given(name, tensor, 0, {}) for name, tensor in target.named_parameters()]
    items: list[Any] = [target] if isinstance(target, torch.Tensor) else list(target)
    if items and isinstance(items[0], Mapping):
        given = []
        for index, group in enumerate(items):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            params = group["params"]
            params = [params] if isinstance(params, torch.Tensor) else list(params)
            if "param_names" in group:
                params = list(zip(group["param_names"], params, strict=True))
            given += [_as_given(item, index, options) for item in params]
        return given
    return [_as_given(item, 0, {}) for item in items]


def _as_given(item: Any, group: int, options: Mapping[str, Any]) -> _Given:
    import torch

    name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise UsageError(f"an optimizer takes a module, (name, parameter) pairs, parameters or groups, not a {kind}")
    return _Given(name, tensor, group, options)


def _refuse_duplicates(given: Iterable[_Given]) -> None:
    seen: dict[int, tuple[int, _Given]] = {}
    for position, item in enumerate(given):
        first_position, first = seen.setdefault(id(item.tensor), (position, item))
        if first is not item:
            raise UsageError(
                f"parameter {item.name or f'number {position}'} is given twice, "
                f"first as {first.name or f'number {first_position}'}: an optimizer would step it twice"
            )


def _matches(rule: Rule, item: _Given, index: int) -> bool:
    if "ndim" in rule and item.tensor.ndim not in _as_list(rule["ndim"]):
        return False
    if "match" not in rule:
        return True
    if item.name is None:
        raise UsageError(
            f"param_rules[{index}].match needs the parameters' names: give the module or its named_parameters()"
        )
    return any(fnmatch.fnmatchcase(item.name, pattern) for pattern in _as_list(rule["match"]))


def _selector_text(rule: Rule) -> str:
    return ", ".join(f"{key}={rule[key]!r}" for key in SELECTORS if key in rule)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
