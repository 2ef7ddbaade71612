"""``key.sub=value`` on the command line: the strongest layer, and the mistakes in it.

Every part of a recipe can be addressed; list items by index or by their name: ``callbacks.0.every=5``,
``callbacks.gsnr.every=5``, ``stages.seq128.optimizer.lr=0.01``.
"""

from __future__ import annotations

from lbzoo.errors import did_you_mean
from lbzoo.recipe.merging import merge, refuse_unknown_stages
from lbzoo.recipe.nodes import KeyPath, Node, Origin, Problem, RecipeError
from lbzoo.recipe.reading import is_text, read_value
from lbzoo.recipe.tidying import tidy

_REFUSED = {
    "mini": "overrides are applied after the mini: block; leave 'mini.' out",
    "base": "the base is the recipe's own; copy the recipe (`lbzoo cp`) to change it",
}


def apply_override(root: Node, text: str) -> tuple[Node, list[Problem]]:
    """``text`` over a merged recipe: the result, and the mistakes in names that it was possible to mend.

    Raises RecipeError where nothing can be made of the override.
    """
    if not is_text(text):
        raise _error(text.encode("utf-8", "replace").decode(), "this is not UTF-8 text")
    address, equals, value = text.partition("=")
    keys = tuple(address.strip().split("."))
    if not equals or not all(keys):
        raise _error(text, "write an override as key.sub=value, without spaces around '='")
    if keys[0] in _REFUSED:
        raise _error(text, _REFUSED[keys[0]])
    layer = _overlay(root, keys, (), read_value(value.strip(), Origin("override", keys, text=text)), text)
    problems = tidy(layer)
    problems += refuse_unknown_stages(root, layer)
    return merge(root, layer), problems


def _overlay(existing: Node | None, keys: tuple[str, ...], done: KeyPath, value: Node, text: str) -> Node:
    """The layer that puts ``value`` at ``keys`` below ``existing``; a list on the way is copied and changed."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    here = Origin("override", done, text=text)
    if existing is None or existing.value is None:
        return Node({key: _overlay(None, rest, (*done, key), value, text)}, here)
    if existing.is_list:
        items = existing.copy().value
        index = _index(items, key)
        if index is None:
            raise _error(text, _no_such_item(items, key), done)
        layer = _overlay(items[index], rest, (*done, index), value, text)
        items[index] = merge(items[index], layer, "callback" if done == ("callbacks",) else "item")
        return Node(items, here)
    if not existing.is_mapping:
        raise _error(text, f"is {existing.value!r}, which has no keys; '{key}' cannot be set in it", done)
    if done == ("stages",) and key not in existing.value and key.isdigit() and int(key) < len(existing.value):
        key = list(existing.value)[int(key)]
    return Node({key: _overlay(existing.get(key), rest, (*done, key), value, text)}, here)


def _index(items: list[Node], key: str) -> int | None:
    """The position of the item with that name or index."""
    names = _names(items)
    if key in names:
        return names.index(key)
    if key.removeprefix("-").isdecimal() and -len(items) <= int(key) < len(items):
        return int(key) % len(items)
    return None


def _no_such_item(items: list[Node], key: str) -> str:
    names = _names(items)
    hint = did_you_mean(key, [name for name in names if name])
    if "?" not in hint:
        held = ", ".join(f"{index}" + (f" ({name})" if name else "") for index, name in enumerate(names))
        hint = f"; it holds {held or 'nothing'}"
    return f"has no item '{key}'{hint}"


def _names(items: list[Node]) -> list[str]:
    return [str(name.value) if (name := item.get("name")) is not None else "" for item in items]


def _error(text: str, message: str, path: KeyPath = ()) -> RecipeError:
    return RecipeError([Problem(Origin("override", path, text=text), message)])
