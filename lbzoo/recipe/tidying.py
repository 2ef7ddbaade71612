"""One layer (a file, or an override) brought into the form that layers are merged in.

- A key that is no key of its block is reported, and put right where it is plainly a misspelling, so that the mistakes
  inside the misspelt block are found in the same pass.
- A component may be written as its name alone: ``optimizer: lamb`` becomes ``optimizer: {name: lamb}``.
- ``stages`` becomes a mapping by name: a StageList where it was a list, which says what stages there are; a mapping
  only changes the stages that there are.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

from pydantic import BaseModel

from lbzoo.errors import did_you_mean, nearest_name
from lbzoo.recipe.nodes import Node, Problem
from lbzoo.recipe.schema import Recipe, Settings, StageSettings

Kind: TypeAlias = Literal["task", "data", "optimizer", "schedule", "callback"]
COMPONENTS: tuple[Kind, ...] = ("task", "data", "optimizer", "schedule")

# What other frameworks call it. The nearest name alone would miss these or find another.
_OTHER_WORDS = {
    "batch_size": "global_batch_size",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "gpus": "devices",
    "dataset": "data",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "phases": "stages",
}


_MAY_BE_NULL = [key for key, field in Recipe.model_fields.items() if field.default is None]


class StageList(dict[str, Node]):
    """Stages by name that were written as a list: these run, in this order."""


def tidy(root: Node) -> list[Problem]:
    """Bring a layer into the form above, in place; returns the mistakes."""
    if not root.is_mapping:
        return []
    problems = list(_check_keys(root, Recipe))
    # `callbacks:` with every line below it commented out says nothing.
    root.value = {key: node for key, node in root.value.items() if node.value is not None or key in _MAY_BE_NULL}
    _write_out(root)
    callbacks = root.get("callbacks")
    if callbacks is not None and callbacks.is_list:
        callbacks.value = [_as_component(item) for item in callbacks.value]
    if (stages := root.get("stages")) is not None:
        problems += _tidy_stages(stages)
    if (mini := root.get("mini")) is not None:
        for key in ("version", "base", "mini"):
            if (misplaced := mini.get(key)) is not None:
                problems.append(Problem(misplaced.origin, f"'{key}' belongs to the recipe, not to its mini: block"))
                del mini.value[key]
        problems += tidy(mini)
    return problems


def correction(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` stands for: another framework's word for it, or a misspelling."""
    known = list(known)
    other = _OTHER_WORDS.get(word)
    return other if other in known else nearest_name(word, known)


def _check_keys(block: Node, model: type[BaseModel]) -> Iterator[Problem]:
    """Unknown keys of a block with a closed set of keys, and of the blocks in it."""
    fields = model.model_fields
    if not block.is_mapping:
        return
    for key in [key for key in block.value if key not in fields]:
        node = block.value.pop(key)
        meant = correction(key, fields)
        home = _home_of(_OTHER_WORDS.get(key, key)) if model is Recipe else None
        if home is not None:
            yield Problem(node.origin, f"unknown key; did you mean '{home}'?")
        elif meant is not None:
            yield Problem(node.origin, f"unknown key; did you mean '{meant}'?")
            block.value.setdefault(meant, node)
        else:
            yield Problem(node.origin, f"unknown key{did_you_mean(key, fields)}")
    for key, node in block.value.items():
        inner = _block_model(fields[key].annotation)
        if inner is not None and issubclass(inner, Settings) and not node.is_list:
            yield from _check_keys(node, inner)


def _home_of(key: str) -> str | None:
    """Where a key that was written at the top level belongs: ``trainer.devices``."""
    if key in ("lr", "weight_decay", "betas", "momentum"):
        return f"optimizer.{key}"
    if key in ("name", "id", "row"):
        return None
    for name, field in Recipe.model_fields.items():
        inner = _block_model(field.annotation)
        if inner is not None and key in inner.model_fields:
            return f"{name}.{key}"
    return None


def _block_model(annotation: object) -> type[BaseModel] | None:
    """The model of a field that holds one block; None for lists and plain values."""
    members = typing.get_args(annotation) or (annotation,)
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    return models[0] if models and typing.get_origin(annotation) is not list else None


def _write_out(block: Node) -> None:
    for key in COMPONENTS:
        if (component := block.get(key)) is not None:
            block.value[key] = _as_component(component)


def _as_component(node: Node) -> Node:
    return Node({"name": Node(node.value, node.origin)}, node.origin) if isinstance(node.value, str) else node


def _tidy_stages(stages: Node) -> list[Problem]:
    problems: list[Problem] = []
    if stages.is_list:
        by_name = StageList()
        for stage in stages.value:
            if not stage.is_mapping:
                problems.append(Problem(stage.origin, "a stage is a mapping with a name: {name: seq128, steps: 3519}"))
                continue
            name = stage.get("name")
            if name is None or not isinstance(name.value, str):
                at = stage.origin.child("name") if name is None else name.origin
                problems.append(Problem(at, "every stage needs a name, which is text"))
                continue
            if name.value in by_name:
                problems.append(Problem(name.origin, f"two stages are named '{name.value}'"))
            by_name[name.value] = stage
        stages.value = by_name
    elif stages.is_mapping:
        for name, stage in stages.value.items():
            own = stage.value.pop("name", None) if stage.is_mapping else None
            if not stage.is_mapping:
                problems.append(Problem(stage.origin, "a stage's changes are a mapping: {steps: 100}"))
            elif own is not None and own.value != name:
                problems.append(Problem(own.origin, f"this stage is '{name}'; a stage cannot be renamed"))
        stages.value = {name: stage for name, stage in stages.value.items() if stage.is_mapping}
    for stage in _values(stages):
        problems += _check_keys(stage, StageSettings)
        _write_out(stage)
    return problems


def _values(stages: Node) -> list[Node]:
    return list(stages.value.values()) if isinstance(stages.value, Mapping) else []
