"""YAML data whose every value remembers where it was written, and the errors that say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lbzoo.errors import UsageError

Key: TypeAlias = str | int
KeyPath: TypeAlias = tuple[Key, ...]
Source: TypeAlias = Literal["recipe", "base", "row", "scale", "override", "default", "facts"]


@dataclass(frozen=True)
class Origin:
    """Where a value was written. ``path`` is its place in that document, ``text`` the override as it was typed."""

    source: Source
    path: KeyPath = ()
    file: str | None = None
    line: int | None = None
    text: str = ""

    @property
    def location(self) -> str:
        """The beginning of an error message."""
        if self.source == "override":
            return f"override '{self.text}'"
        if self.file is None:
            return self.text or self.source
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def child(self, key: Key) -> Origin:
        """The origin of a value that is reported at its container's place."""
        return replace(self, path=(*self.path, key))


@dataclass
class Node:
    """A scalar, a mapping of nodes or a list of nodes. ``origin`` is the line of its key, or of its list item.

    ``component`` is set on an option that was written for another component than the one in effect: the name of the
    one that it was written for (see ``merging.py``).
    """

    value: Any
    origin: Origin
    component: str | None = None

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.value, list)

    def get(self, key: str) -> Node | None:
        """The node under ``key``; None where this is no mapping or has no such key."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def copy(self) -> Node:
        """A copy whose containers can be changed."""
        value = self.value
        if isinstance(value, dict):
            value = type(value)((key, node.copy()) for key, node in value.items())
        elif isinstance(value, list):
            value = [node.copy() for node in value]
        return Node(value, self.origin, self.component)

    def plain(self) -> Any:
        """The data without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """This node and all below it, each with its path from here."""
        yield path, self
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.walk((*path, key))
        elif isinstance(self.value, list):
            for index, node in enumerate(self.value):
                yield from node.walk((*path, index))


def from_plain(value: Any, origin: Origin) -> Node:
    """Plain data as nodes, every one with ``origin`` and its own path."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, origin.child(str(key))) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, origin.child(index)) for index, item in enumerate(value)], origin)
    return Node(value, origin)


def dotted(path: Iterable[Key]) -> str:
    """``stages.0.optimizer.lr``"""
    return ".".join(str(key) for key in path)


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is written and what to do about it."""

    origin: Origin
    message: str

    def __str__(self) -> str:
        parts = [self.origin.location, dotted(self.origin.path), self.message]
        return ": ".join(part for part in parts if part)


class RecipeError(UsageError):
    """All the mistakes found in a recipe, in the order of the file. ``problems`` holds them one by one."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = list(dict.fromkeys(problems))
        self.problems = sorted(unique, key=lambda problem: (problem.origin.file or "", problem.origin.line or 0))
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines.append(f"{len(lines)} mistakes")
        super().__init__("\n".join(lines))


def display_path(path: Path) -> str:
    """``path`` relative to the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
