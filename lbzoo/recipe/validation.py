"""Values against types, by pydantic, with the mistakes told in the recipe's own terms.

Values are checked strictly: ``"8"`` is text and no number, ``true`` is no 1. Lists become tuples where a tuple is asked
for, whole numbers become floats.
"""

from __future__ import annotations

import functools
import json
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lbzoo.errors import nearest_name
from lbzoo.recipe.nodes import Node, Origin, Problem

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a mapping (`key: value` lines)",
    "model": "a mapping (`key: value` lines)",
    "path": "a path",
    "none": "null",
}


def validate_block(model: type[M], block: Node) -> tuple[M | None, list[Problem]]:
    """The block as a model; None where there are mistakes."""
    try:
        return model.model_validate_json(json.dumps(block.plain()), strict=True), []
    except ValidationError as error:
        return None, _problems(error, block)


def validate_value(annotation: Any, node: Node) -> tuple[Any, list[Problem]]:
    """The value of an option as its annotation wants it; unchanged where the annotation cannot be checked."""
    adapter = _adapter(annotation)
    if adapter is None:
        return node.plain(), []
    try:
        return adapter.validate_json(json.dumps(node.plain()), strict=True), []
    except ValidationError as error:
        return None, _problems(error, node)


def json_schema_of(annotation: Any) -> dict[str, Any]:
    """The JSON schema of an option's annotation; ``{}``, anything, where it cannot be checked."""
    adapter = _adapter(annotation)
    return {} if adapter is None else adapter.json_schema()


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    checkable = _checkable(annotation)
    return None if checkable is Any else TypeAdapter(checkable)


def _checkable(annotation: Any) -> Any:
    """The part of an annotation that YAML data can be checked against; Any where there is none.

    ``float | Tensor`` is checked as ``float``: a recipe cannot hold a tensor.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in map(_checkable, arguments) if member is not Any]
        return typing.Union[tuple(members)] if members else Any  # noqa: UP007 (the members are known only here)
    if origin is typing.Literal:
        return annotation
    if origin in (tuple, list, dict):
        return origin[tuple(part if part is Ellipsis else _checkable(part) for part in arguments)]
    if annotation in (bool, int, float, str, list, tuple, dict, types.NoneType, None):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    try:
        TypeAdapter(annotation)
        return annotation if getattr(annotation, "__module__", "") in ("pathlib", "collections.abc", "typing") else Any
    except Exception:  # pydantic raises its own and others' for what it has no schema for
        return Any


def _problems(error: ValidationError, root: Node) -> list[Problem]:
    """One problem for each place: a union that fails gives an error for each of its members."""
    places: dict[tuple[str | int, ...], tuple[Node, Origin, list[ErrorDetails]]] = {}
    for details in error.errors(include_url=False):
        path, node, origin = _place(root, details)
        places.setdefault(path, (node, origin, []))[2].append(details)
    return [Problem(origin, _message(found, node)) for node, origin, found in places.values()]


def _place(root: Node, details: ErrorDetails) -> tuple[tuple[str | int, ...], Node, Origin]:
    """Path, node and origin of an error. Parts of pydantic's location that name a union's member are passed over."""
    node = root
    path: list[str | int] = []
    for part in details["loc"]:
        below: Node | None = None
        if node.is_mapping:
            below = node.value.get(part)
        elif node.is_list and isinstance(part, int) and part < len(node.value):
            below = node.value[part]
        if below is not None:
            node, path = below, [*path, part]
    if details["type"] == "missing" and node.is_mapping:
        key = details["loc"][-1]
        return (*path, key), node, node.origin.child(key)
    return tuple(path), node, node.origin


def _message(found: list[ErrorDetails], node: Node) -> str:
    first = found[0]
    if first["type"] == "missing":
        return "required, but missing" if node.is_mapping else f"too few values: {shown(node.plain())}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("too_long", "too_short"):
        amount = "many" if first["type"] == "too_long" else "few"
        return f"too {amount} values: {shown(node.plain())}"
    words: list[str] = []
    for details in found:
        words += [word for word in _expected(details) if word not in words]
    value = node.plain()
    if len(words) > 1:
        words = [word for word in words if word != "null"]
    choices = [word.strip("'") for word in words if word.startswith("'")]
    near = nearest_name(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean '{near}'?" if near else _number_hint(value, words)
    return f"expected {_any_of(words)}, got {shown(value)}{hint}"


def _expected(details: ErrorDetails) -> list[str]:
    context = details.get("ctx", {})
    kind = details["type"]
    if kind == "literal_error":
        return re.findall(r"'[^']*'|[^\s,']+", context["expected"].replace(" or ", " "))
    for word, relation in (
        ("gt", "greater than"),
        ("ge", "of at least"),
        ("lt", "less than"),
        ("le", "of at most"),
    ):
        if word in context:
            return [f"a number {relation} {context[word]:g}"]
    for prefix, words in _EXPECTED.items():
        if kind == prefix or kind.startswith(f"{prefix}_"):
            return [words]
    return [details["msg"][:1].lower() + details["msg"][1:]]


def _any_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _number_hint(value: Any, words: list[str]) -> str:
    """What to write where a number was written as something else."""
    if isinstance(value, float) and value.is_integer() and "a whole number" in words:
        return f"; write {int(value)}"
    if isinstance(value, str) and any("number" in word for word in words):
        plain = re.sub(r"(?<=\d)[_,](?=\d{3}(\D|$))", "", value)
        if re.fullmatch(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?", plain):
            return f"; write {plain}, without quotes or separators"
    return ""
