"""Named components that can be listed and checked without importing them.

Importing torch takes more than a second and Lightning five, so a list of what exists, and the check of a recipe's
options, must not import anything. A component registers itself with a decorator whose name and first argument are
literals::

    @register_optimizer("mine", paper="...", lr_scaling="sqrt")
    class Mine(torch.optim.Optimizer):
        def __init__(self, params, *, lr: float = 1e-3, weight_decay: float = 0.0): ...

The registry reads those decorators, and the signature below them, from the source files of its package
(:func:`scan_source`), and imports a module only when its component is asked for. Adding a component therefore edits no
list. Components of other packages come through entry points (group ``lbzoo.<kind>s``, entry name = registry name) and
through the plugin files of a recipe.

A registry may have *wrappers*: components registered under a prefix that take another component's product. With a
wrapper ``larc_``, every name ``<name>`` also exists as ``larc_<name>``, with the options of both.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from lbzoo.errors import UnknownNameError, UsageError

T = TypeVar("T")


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


@dataclass(frozen=True)
class _Added:
    component: Any
    meta: Mapping[str, Any]
    file: str
    line: int


class Registry:
    """The components of one kind (``optimizer``, ``task``, ...), by name.

    ``package`` is the importable package whose files are scanned; ``kind`` names the decorator ``register_<kind>`` and
    the entry-point group ``lbzoo.<plural>``. ``wrappers`` is a registry whose names are prefixes (see the module's
    docstring).
    """

    def __init__(self, kind: str, *, package: str, plural: str | None = None, wrappers: Registry | None = None) -> None:
        self.kind = kind
        self.package = package
        self.wrappers = wrappers
        self.entry_point_group = f"lbzoo.{plural or kind + 's'}"
        self._added: dict[str, _Added] = {}

    def register(self, name: str, **meta: Any) -> Callable[[T], T]:
        """A decorator that adds a class or factory. A name that another source file has taken is an error."""

        def decorate(component: T) -> T:
            self.add(name, component, **meta)
            return component

        return decorate

    def add(self, name: str, component: Any, **meta: Any) -> None:
        """Register ``component``; raises UsageError where another source file holds the name."""
        file, line = _definition(component)
        holder = self._holder(name)
        if holder is not None and holder.rpartition(":")[0] != file:
            raise UsageError(
                f"{file}:{line}: the {self.kind} name '{name}' is taken by {holder}; register under another name"
            )
        self._added[name] = _Added(component, MappingProxyType(dict(meta)), file, line)

    def get(self, name: str) -> Any:
        """The class or factory registered under ``name``, imported if need be."""
        wrapped = self._wrapped(name)
        if wrapped is not None:
            assert self.wrappers is not None
            prefix, base = wrapped
            return _wrap(self.wrappers.get(prefix), self.wrappers.options(prefix), self.get(base))
        if name not in self._added:
            if name in self._scanned:
                importlib.import_module(self._scanned[name].module)
            elif name in self._entry_points:
                # The module may use the decorator itself; if it does not, the entry point's object is the component.
                loaded = self._entry_points[name].load()
                if name not in self._added:
                    self.add(name, loaded)
        if name not in self._added:
            raise UnknownNameError(self.kind, name, self.names())
        return self._added[name].component

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a glob, sorted; nothing is imported."""
        plain = {*self._added, *self._scanned, *self._entry_points}
        prefixes = self.wrappers.names() if self.wrappers else []
        wrapped = {prefix + base for prefix in prefixes for base in plain if self._wrapped(prefix + base)}
        return sorted(fnmatch.filter(plain | wrapped, pattern))

    def __contains__(self, name: str) -> bool:
        return self._is_plain(name) or self._wrapped(name) is not None

    def options(self, name: str) -> Mapping[str, Option]:
        """The options that ``name`` takes; imports the component only where its source cannot be read."""
        options = self.entry(name).options
        return options_of(self.get(name)) if options is None else options

    def entry(self, name: str) -> Entry:
        """What is known of ``name`` without importing it (see Entry)."""
        wrapped = self._wrapped(name)
        if wrapped is not None:
            return self._entry_of_wrapped(name, *wrapped)
        if name in self._scanned:
            return self._scanned[name]
        if name in self._added:
            return self._entry_of_added(name)
        if name in self._entry_points:
            point = self._entry_points[name]
            origin = f"entry point of {point.dist.name}" if point.dist else "entry point"
            return Entry(name, self.kind, point.module, point.attr, origin)
        raise UnknownNameError(self.kind, name, self.names())

    def meta(self, name: str) -> Mapping[str, Any]:
        """The keywords given to the decorator; imports the component, so that values need not be literals."""
        wrapped = self._wrapped(name)
        if wrapped is not None:
            assert self.wrappers is not None
            return {**self.meta(wrapped[1]), **self.wrappers.meta(wrapped[0])}
        self.get(name)
        return self._added[name].meta

    def _entry_of_added(self, name: str) -> Entry:
        added = self._added[name]
        component = added.component
        return Entry(
            name,
            self.kind,
            component.__module__,
            getattr(component, "__qualname__", name),
            f"{added.file}:{added.line}",
            (inspect.getdoc(component) or "").partition("\n")[0],
            added.meta,
            options_of(component),
        )

    def _is_plain(self, name: str) -> bool:
        return name in self._added or name in self._scanned or name in self._entry_points

    def _wrapped(self, name: str) -> tuple[str, str] | None:
        """(prefix, base) of a wrapped name. A plain name is not split, nor one whose two parts share an option."""
        if self.wrappers is None or self._is_plain(name):
            return None
        for prefix in self.wrappers.names():
            base = name.removeprefix(prefix)
            if base != name and self._is_plain(base):
                shared = set(self.wrappers.options(prefix)) & set(self.entry(base).options or ())
                return None if shared else (prefix, base)
        return None

    def _entry_of_wrapped(self, name: str, prefix: str, base_name: str) -> Entry:
        assert self.wrappers is not None
        wrapper, base = self.wrappers.entry(prefix), self.entry(base_name)
        inherited = {key: value for key, value in base.meta.items() if key != "aliases"}
        return Entry(
            name,
            self.kind,
            wrapper.module,
            wrapper.qualname,
            wrapper.source,
            f"{wrapper.first_line.rstrip('.')} (around {base_name}).",
            {**inherited, **wrapper.meta},
            {**self.options(base_name), **self.wrappers.options(prefix)},
        )

    def _holder(self, name: str) -> str | None:
        if name in self._added:
            return f"{self._added[name].file}:{self._added[name].line}"
        if name in self._scanned:
            return self._scanned[name].source
        return None

    @functools.cached_property
    def _scanned(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for module, path in _source_files(self.package):
            for entry in scan_source(path, self.kind, module):
                if entry.name in entries:
                    raise UsageError(f"{entry.source}: '{entry.name}' is taken by {entries[entry.name].source}")
                entries[entry.name] = entry
        return entries

    @functools.cached_property
    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        points: dict[str, importlib.metadata.EntryPoint] = {}
        for point in importlib.metadata.entry_points(group=self.entry_point_group):
            holder = self._scanned[point.name].source if point.name in self._scanned else None
            if point.name in points:
                holder = f"the entry point {points[point.name].value}"
            if holder is not None:
                raise UsageError(f"entry point {point.value}: the {self.kind} name '{point.name}' is taken by {holder}")
            points[point.name] = point
        return points


def _source_files(package: str) -> Iterator[tuple[str, Path]]:
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


def _wrap(
    wrapper: Callable[..., Any], wrapper_options: Mapping[str, Option], base: Callable[..., Any]
) -> Callable[..., Any]:
    """A factory that gives each option to the one of the two that takes it, and the base's product to the wrapper."""

    def build(target: Any, **options: Any) -> Any:
        own = {name: options.pop(name) for name in wrapper_options if name in options}
        return wrapper(base(target, **options), **own)

    return build


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


def _definition(component: Any) -> tuple[str, int]:
    """(file, line) where a class or function was defined; the module's name where it has no file."""
    target = inspect.unwrap(component) if callable(component) else component
    try:
        return str(Path(inspect.getfile(target)).resolve()), inspect.getsourcelines(target)[1]
    except (TypeError, OSError):
        return str(getattr(component, "__module__", type(component).__module__)), 0


optimizer_wrappers = Registry("optimizer_wrapper", package="lbzoo.optim")
optimizers = Registry("optimizer", package="lbzoo.optim", wrappers=optimizer_wrappers)
schedules = Registry("schedule", package="lbzoo.schedules")
models = Registry("model", package="lbzoo.models")
tasks = Registry("task", package="lbzoo.tasks")
data = Registry("data", package="lbzoo.data", plural="data")
callbacks = Registry("callback", package="lbzoo.callbacks")

register_schedule = schedules.register
register_model = models.register
register_task = tasks.register
register_data = data.register
register_callback = callbacks.register
