"""What an option of an optimizer may be, and the error that names one that is not. Importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lbzoo.errors import UsageError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least_zero(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_learning_rate(value: Any) -> bool:
    if _is_number(value):
        return _at_least_zero(value)
    from torch import Tensor

    # A learning rate on another device is not read: that would wait for the device.
    one = isinstance(value, Tensor) and value.numel() == 1
    return one and (value.device.type != "cpu" or _at_least_zero(value.item()))


def _is_average_weight(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_pair(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(holds, value))


def _is_norm_range(value: Any) -> bool:
    if value is None:
        return True
    return _is_pair(value, lambda bound: _is_number(bound) and bound >= 0) and value[0] <= value[1]


_SWITCH: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")

CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_learning_rate, "a finite number of 0 or more, or a tensor of one element"),
    "betas": (lambda value: _is_pair(value, _is_average_weight), "two numbers, each at least 0 and below 1"),
    "momentum": (_is_average_weight, "a number at least 0 and below 1"),
    "eps": (_at_least_zero, "a finite number of 0 or more"),
    "norm_eps": (_at_least_zero, "a finite number of 0 or more"),
    "weight_decay": (_at_least_zero, "a finite number of 0 or more"),
    "trust_coefficient": (lambda value: _at_least_zero(value) and value > 0, "a finite number above 0"),
    "norm_order": (lambda value: _is_number(value) and value in (1, 2, math.inf), "1, 2 or inf"),
    "weight_norm_range": (_is_norm_range, "null, or two numbers (low, high) of 0 or more"),
    "gamma": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "beta3": (lambda value: value is None or _is_average_weight(value), "null, or a number at least 0 and below 1"),
    "gsnr_cap": (lambda value: value is None or (_is_number(value) and value > 0), "null, or a number above 0"),
    "second_moment": (lambda value: value in ("adapted", "raw"), "'adapted' or 'raw'"),
    "adapt": _SWITCH,
    "bias_correction": _SWITCH,
    "normalize_grad": _SWITCH,
    "amsgrad": _SWITCH,
    "ema": _SWITCH,
    "decoupled": _SWITCH,
    "eps_in_root": _SWITCH,
    "lr_in_momentum": _SWITCH,
    "clip": _SWITCH,
    "compile": _SWITCH,
}


def check_group(group: Mapping[str, Any], where: str, choices: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Raise UsageError, naming every option of a parameter group that is outside its range.

    ``choices``: options that are one of a few values, by name.
    """
    mistakes = [
        f"{where}: {name} must be {text}, got {group[name]!r}"
        for name, (holds, text) in CHECKS.items()
        if name in group and not holds(group[name])
    ]
    mistakes += [
        f"{where}: {name} must be one of {', '.join(map(repr, known))}, got {group[name]!r}"
        for name, known in (choices or {}).items()
        if not any(group[name] == value and type(group[name]) is type(value) for value in known)
    ]
    if mistakes:
        raise UsageError("\n".join(mistakes))
