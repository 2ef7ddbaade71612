"""YAML text to nodes with line numbers.

Scalars follow YAML 1.2: ``1e-2`` is a number, ``on`` and ``2024-01-01`` are text. Keys are always text. A key given
twice is a mistake; PyYAML would silently keep the second one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lbzoo.recipe.nodes import KeyPath, Node, Origin, Problem, RecipeError, Source, display_path

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_MAX_DEPTH = 100  # Python's own limit depends on who else is in the process
_MAX_NODES = 20_000  # aliases of aliases can stand for more nodes than memory holds


def read_recipe(path: Path, source: Source = "recipe") -> tuple[Node, list[Problem]]:
    """The file as a mapping node, and its duplicate keys and other mistakes that leave the rest readable.

    Raises RecipeError where nothing can be read: no such file, not text, not YAML, not a mapping.
    """
    file = display_path(path)
    text = _read_text(path, file)
    origin = Origin(source, (), file, 1)
    reader = _Reader(source, file)
    try:
        root = reader.node(_compose(text), (), 1)
    except yaml.YAMLError as error:
        raise RecipeError([_syntax_problem(error, text, source, file)]) from None
    except RecursionError:
        raise RecipeError([Problem(origin, "the YAML is nested too deeply to be a recipe")]) from None
    if root is None or root.value is None:
        raise RecipeError([Problem(origin, "the file is empty; `lbzoo cp` copies a recipe to start from")])
    if not root.is_mapping:
        kind = "a list" if root.is_list else f"the text {str(root.value)[:40]!r}"
        raise RecipeError([Problem(root.origin, f"a recipe is a mapping (`key: value` lines), and this is {kind}")])
    return root, reader.problems


def read_value(text: str, origin: Origin) -> Node:
    """The value of an override, in YAML: a number, text, ``[0.9, 0.98]``, ``{name: digits}``; empty is null."""
    reader = _Reader(origin.source, None, origin)
    try:
        node = reader.node(_compose(text), origin.path, None)
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(getattr(error, "problem", None) or error)
        raise RecipeError([Problem(origin, f"cannot read the value {text!r} ({reason}); quote it")]) from None
    if reader.problems:
        raise RecipeError(reader.problems)
    return Node(None, origin) if node is None else node


def leading_comment(text: str) -> str:
    """The comment block that a file begins with, without its ``#``."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


def scalar(text: str) -> Any:
    """The value of a plain scalar by YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float(f"{infinite[1]}inf")
    return text


def is_text(value: str) -> bool:
    """Whether a string can be written out: an escape, or an argument that is not UTF-8, may hold half a character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path, file: str) -> str:
    origin = Origin("recipe", (), file)
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise RecipeError([Problem(origin, "this is a folder, not a recipe file")]) from None
    except FileNotFoundError:
        raise RecipeError([Problem(origin, "no such file")]) from None
    except OSError as error:
        raise RecipeError([Problem(origin, f"cannot be read ({error.strerror or error})")]) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        at = Origin("recipe", (), file, line)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        raise RecipeError([Problem(at, message)]) from None


def _compose(text: str) -> yaml.Node | None:
    """PyYAML's node tree; its own ideas of numbers and dates are not used (``scalar``)."""
    composed: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return composed


class _Loader(yaml.BaseLoader):
    """Builds no values, and gives up early on what is nested without end."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise RecursionError
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Reader:
    """Turns PyYAML's nodes into ours, and collects the mistakes on the way."""

    def __init__(self, source: Source, file: str | None, override: Origin | None = None) -> None:
        self.source, self.file, self.override = source, file, override
        self.problems: list[Problem] = []
        self._open: set[int] = set()  # the containers around the current node: an alias to one of them has no end
        self._count = 0

    def node(self, node: yaml.Node | None, path: KeyPath, line: int | None) -> Node | None:
        if node is None:
            return None
        origin = self._origin(path, line)
        self._count += 1
        if self._count > _MAX_NODES:
            raise yaml.YAMLError("too many values for a recipe")
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, origin), origin)
        if id(node) in self._open:
            self.problems.append(Problem(origin, "an alias stands inside what it names"))
            return Node(None, origin)
        self._open.add(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._list(node, path)
        self._open.discard(id(node))
        return Node(value, origin)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Node]:
        items: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(self._origin(path, line), "a key is a name, not a list or a mapping"))
                continue
            key = str(key_node.value)
            origin = self._origin((*path, key), line)
            if key == "<<":
                self.problems.append(Problem(origin, "merge keys are not supported; use `base:` or stages"))
            elif key in items:
                first = items[key].origin.line
                where = "" if self.override or first is None else f" (first on line {first})"
                self.problems.append(Problem(origin, f"this key is given twice{where}"))
            else:
                items[key] = self.node(value_node, (*path, key), line) or Node(None, origin)
        return items

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Node]:
        children = [self.node(item, (*path, i), item.start_mark.line + 1) for i, item in enumerate(node.value)]
        return [child for child in children if child is not None]

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Any:
        if node.tag not in (f"{_TAG}str", "!"):
            self.problems.append(Problem(origin, f"the tag {node.tag.replace(_TAG, '!!')} is not supported"))
        if not is_text(node.value):
            self.problems.append(Problem(origin, "half of a surrogate pair is no text"))
            return None
        return scalar(node.value) if node.style is None else node.value

    def _origin(self, path: KeyPath, line: int | None) -> Origin:
        if self.override is not None:
            return Origin(self.override.source, path, text=self.override.text)
        return Origin(self.source, path, self.file, line)


def _syntax_problem(error: yaml.YAMLError, text: str, source: Source, file: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else text[: getattr(error, "position", 0)].count("\n") + 1
    reason = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    lines = text.splitlines()
    at = lines[line - 1] if line <= len(lines) else ""
    if "\t" in at[: len(at) - len(at.lstrip())]:
        message = "the line is indented with a tab; YAML takes spaces only"
    elif "but found another document" in reason:
        message = "a second document begins here (`---`); a recipe is one document"
    else:
        message = f"not YAML: {reason}"
        if "mapping values are not allowed" in reason:
            message += " (is a quote or a line break missing, or the indentation off?)"
    return Problem(Origin(source, (), file, line), message)
