"""The components that a recipe names: what options they take, and whether what the recipe says fits.

Options are read from source files where that is possible; a class of another package (``package.module:Class``) is
imported and inspected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from lbzoo import registry
from lbzoo.errors import LbzooError, UsageError, did_you_mean, import_hint
from lbzoo.optim import optimizer_options
from lbzoo.param_groups import COMMON_OPTIONS, SELECTORS
from lbzoo.recipe.merging import SHARED_KEYS
from lbzoo.recipe.nodes import Node, Problem
from lbzoo.recipe.resolved import Component
from lbzoo.recipe.tidying import Kind, correction
from lbzoo.recipe.validation import shown, validate_value
from lbzoo.signatures import REQUIRED, Option, options_of

REGISTRIES: Mapping[str, registry.Registry] = {
    "task": registry.tasks,
    "data": registry.data,
    "optimizer": registry.optimizers,
    "schedule": registry.schedules,
    "callback": registry.callbacks,
}


def component_options(kind: Kind, name: str) -> Mapping[str, Option]:
    """The options that a component takes. Raises UsageError where there is no such component."""
    if ":" not in name:
        return optimizer_options(name) if kind == "optimizer" else REGISTRIES[kind].options(name)
    module, _, attribute = name.partition(":")
    if not (all(module.split(".")) and attribute):
        raise UsageError(f"'{name}' is no class of a module; write package.module:Class")
    try:
        return optimizer_options(name) if kind == "optimizer" else _foreign_options(component_class(kind, name))
    except LbzooError:
        raise
    except Exception as error:  # whatever the code of another package does when it is imported
        raise UsageError(f"importing '{name}' failed: {type(error).__name__}: {error}") from error


def component_class(kind: Kind, name: str) -> Any:
    """The class or factory that ``name`` stands for, imported. Raises UsageError."""
    if ":" not in name:
        return REGISTRIES[kind].get(name)
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"cannot import '{module_name}': {error}{import_hint(module_name)}") from error
    if not hasattr(module, attribute):
        known = [each for each in vars(module) if not each.startswith("_")]
        raise UsageError(f"module '{module_name}' has no '{attribute}'{did_you_mean(attribute, known, limit=10)}")
    return getattr(module, attribute)


def leave_out_foreign(kind: Kind, block: Node) -> list[str]:
    """Take out options that were written for another component than the one now named, and that this one lacks.

    Returns a note for each. An option that neither takes stays: it is a mistake, and reported as one.
    """
    name = block.get("name")
    if name is None or not isinstance(name.value, str):
        return []
    taken = _options_or_none(kind, name.value)
    if taken is None:
        return []
    notes = []
    for option in [option for option, node in block.value.items() if node.component not in (None, name.value)]:
        node = block.value[option]
        former = _options_or_none(kind, node.component)
        if option == "param_rules":
            notes += _leave_out_of_rules(node, name.value, taken)
        elif option not in taken and (former is None or option in former):
            del block.value[option]
            notes.append(f"{kind} '{name.value}' takes no {option}: left out (written for '{node.component}')")
    return notes


def check_component(kind: Kind, block: Node, given: Mapping[str, Any] | None = None) -> tuple[Component, list[Problem]]:
    """The component that a block names, its options checked and converted, and what is wrong with them.

    ``given`` are values that fill options which the recipe leaves out. A misspelt key of the recipe's own
    (``global_batch_size``) is put right in ``block`` after it was reported.
    """
    name = block.get("name")
    if not block.is_mapping or name is None or not isinstance(name.value, str):
        return Component(""), []  # said by the validation of the block
    try:
        options = component_options(kind, name.value)
    except UsageError as error:
        return Component(name.value), [Problem(name.origin, str(error))]
    values, problems = _check_options(kind, name.value, options, block)
    for option, value in (given or {}).items():
        if option in options:
            values.setdefault(option, value)
    written = set(block.value)
    for key, known in options.items():
        if known.default is REQUIRED and key not in {*values, *written, *SHARED_KEYS[kind]}:
            problems.append(Problem(block.origin, f"{kind} '{name.value}' needs the option '{key}'"))
    return Component(name.value, values), problems


def check_rules(optimizer: str, rules: Node | None) -> list[Problem]:
    """What is wrong with the keys of param rules: no way to match, nothing set, no option of the optimizer."""
    taken = _options_or_none("optimizer", optimizer)
    if rules is None or not rules.is_list or taken is None:
        return []
    problems = []
    known = {*taken, *COMMON_OPTIONS, *SELECTORS} - set(SHARED_KEYS["optimizer"])
    for rule in rules.value:
        if not rule.is_mapping:
            continue
        if not set(rule.value) & set(SELECTORS):
            problems.append(Problem(rule.origin, "a rule needs match or ndim to say which parameters it is for"))
        elif not set(rule.value) - set(SELECTORS):
            problems.append(Problem(rule.origin, "a rule sets an option: add weight_decay: 0.0, lr_scale: 0.1, ..."))
        for key, node in rule.value.items():
            if key not in known:
                hint = did_you_mean(key, known)
                problems.append(Problem(node.origin, f"optimizer '{optimizer}' has no option '{key}'{hint}"))
            elif key in taken:
                value, found = validate_value(taken[key].annotation, node)
                problems += found or _out_of_range("optimizer", optimizer, key, value, node)
    return problems


def _check_options(
    kind: Kind, name: str, options: Mapping[str, Option], block: Node
) -> tuple[dict[str, Any], list[Problem]]:
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for option, node in list(block.value.items()):
        if option in SHARED_KEYS[kind]:
            continue
        if option in options:
            values[option], found = validate_value(options[option].annotation, node)
            problems += found or _out_of_range(kind, name, option, values[option], node)
            continue
        known = [*options, *sorted(SHARED_KEYS[kind] - {"name"})]
        meant = correction(option, known)
        hint = f"; did you mean '{meant}'?" if meant else did_you_mean(option, known)
        problems.append(Problem(node.origin, f"{kind} '{name}' has no option '{option}'{hint}"))
        del block.value[option]
        if meant is not None:
            block.value.setdefault(meant, node)
    return values, problems


def _out_of_range(kind: Kind, name: str, option: str, value: Any, node: Node) -> list[Problem]:
    """What the zoo's own optimizers refuse when they are built; others say it then."""
    if kind != "optimizer" or name not in registry.optimizers:
        return []
    from lbzoo.optim.checks import CHECKS

    if option not in CHECKS or not registry.optimizers.entry(name).module.startswith("lbzoo.optim."):
        return []
    holds, text = CHECKS[option]
    text = text.partition(", or a tensor")[0]  # which a recipe cannot hold
    return [] if holds(value) else [Problem(node.origin, f"must be {text}, got {shown(node.plain())}")]


def _leave_out_of_rules(rules: Node, name: str, taken: Mapping[str, Option]) -> list[str]:
    if not rules.is_list:
        return []
    known = {*taken, *COMMON_OPTIONS, *SELECTORS}
    rules.value = [rule.copy() for rule in rules.value]
    left_out: dict[str, None] = {}
    for rule in rules.value:
        for key in [key for key in rule.value if key not in known] if rule.is_mapping else []:
            del rule.value[key]
            left_out[key] = None
    rules.value = [rule for rule in rules.value if not rule.is_mapping or set(rule.value) - set(SELECTORS)]
    return [f"optimizer '{name}' takes no {key}: left out of param_rules" for key in left_out]


def _options_or_none(kind: Kind, name: str | None) -> Mapping[str, Option] | None:
    try:
        return component_options(kind, name) if name else None
    except UsageError:
        return None


def _foreign_options(component: Any) -> dict[str, Option]:
    """All parameters of a class that is no optimizer: its first one is an option like the others."""
    options = options_of(component)
    try:
        first = next(iter(inspect.signature(component).parameters.values()), None)
    except (TypeError, ValueError):
        return options
    if first is not None and first.name not in options and first.kind is first.POSITIONAL_OR_KEYWORD:
        default = REQUIRED if first.default is first.empty else first.default
        options = {first.name: Option(first.name, Any, default), **options}
    return options
