"""What a component's constructor takes, by inspection or from its source alone.

The source is read with ``ast`` so that nothing has to be imported: names, annotations, defaults, docstrings and the
literal keywords of the decorator.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()  # the default of an option that has none


@dataclass(frozen=True)
class Option:
    """One keyword of a component's constructor. ``annotation`` is Any where none is written or it cannot be read."""

    name: str
    annotation: Any = Any
    default: Any = REQUIRED


@dataclass(frozen=True)
class Entry:
    """What is known of a component without importing it.

    ``options`` is None where the source could not be read (an entry point of another package): import the component
    and use :func:`options_of`. ``meta`` holds the literal keywords of the decorator, ``first_line`` the first line of
    the docstring, ``source`` is ``file:line``.
    """

    name: str
    kind: str
    module: str
    qualname: str
    source: str
    first_line: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Option] | None = None


def source_files(package: str) -> Iterator[tuple[str, Path]]:
    """(module name, file) of a package's modules, or of the one module ``package`` names."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return
    if not spec.submodule_search_locations:
        if spec.origin:
            yield package, Path(spec.origin).resolve()
        return
    for folder in spec.submodule_search_locations:
        # Resolved: lbzoo/callbacks is a link, and a class knows the file behind it.
        for path in sorted(Path(folder).resolve().glob("*.py")):
            yield (package if path.stem == "__init__" else f"{package}.{path.stem}"), path


def scan_source(path: Path, kind: str, module: str) -> Iterator[Entry]:
    """The components that a file registers with ``@register_<kind>("name", ...)``, read from its source."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if not (isinstance(call, ast.Call) and _called_name(call) == f"register_{kind}" and call.args):
                continue
            name = _literal(call.args[0])
            if isinstance(name, str):
                meta = {word.arg: _literal(word.value) for word in call.keywords if word.arg}
                yield Entry(
                    name,
                    kind,
                    module,
                    node.name,
                    f"{path}:{node.lineno}",
                    (ast.get_docstring(node) or "").partition("\n")[0],
                    MappingProxyType(meta),
                    _options_from_source(node),
                )


def options_of(component: Callable[..., Any]) -> dict[str, Option]:
    """The keyword options of a class or factory, by inspection. The first positional parameter is not an option.

    A ``**kwargs`` is not an option either: it is what swallows a typo. Where a class takes ``**kwargs``, the optional
    ones of its parent class count, to which it will pass them.
    """
    options = _own_options(component)
    if inspect.isclass(component) and _takes_any_keyword(component):
        for parent in component.__mro__[1:]:
            if "__init__" in vars(parent) and parent is not object:
                inherited = {
                    key: option for key, option in options_of(parent).items() if option.default is not REQUIRED
                }
                return {**inherited, **options}
    return options


def _takes_any_keyword(component: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(component).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _own_options(component: Callable[..., Any]) -> dict[str, Option]:
    try:
        signature = inspect.signature(component)
    except (TypeError, ValueError):
        return {}
    target = component.__init__ if inspect.isclass(component) else component
    try:
        hints = typing.get_type_hints(target)
    except Exception:  # an annotation that cannot be evaluated costs the type check of this component, not the run
        hints = {}
    options = {}
    for index, parameter in enumerate(signature.parameters.values()):
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        positional_first = index == 0 and parameter.kind is not parameter.KEYWORD_ONLY
        if named and not positional_first:
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            options[parameter.name] = Option(parameter.name, hints.get(parameter.name, Any), default)
    return options


_ANNOTATION_NAMES = {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")} | {
    "Path": Path,
    "Sequence": typing.Sequence,
    "Mapping": typing.Mapping,
    "Callable": typing.Callable,
}


def _options_from_source(node: ast.ClassDef | ast.FunctionDef) -> dict[str, Option] | None:
    """Keyword-only parameters, or all after the first, of a factory or of a class's own ``__init__``."""
    function: ast.FunctionDef | None = node if isinstance(node, ast.FunctionDef) else None
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not methods:
            return None
        function = methods[0]
    assert function is not None
    arguments = function.args
    skipped = 1 if isinstance(node, ast.FunctionDef) else 2  # (params) or (self, params)
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*list(zip(positional, defaults, strict=True))[skipped:]]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    return {argument.arg: _option_from_source(argument, default) for argument, default in pairs}


def _option_from_source(argument: ast.arg, default: ast.expr | None) -> Option:
    annotation: Any = Any
    if argument.annotation is not None:
        try:
            annotation = eval(ast.unparse(argument.annotation), dict(_ANNOTATION_NAMES))
        except Exception:  # a type of a library that is not imported here: the option's name is still checked
            annotation = Any
    return Option(argument.arg, annotation, REQUIRED if default is None else _literal(default))


def _literal(node: ast.expr) -> Any:
    """The value of a literal; the source text of any other expression."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
