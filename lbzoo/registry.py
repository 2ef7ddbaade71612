"""Named components that can be listed and checked without importing them.

Importing torch takes more than a second and Lightning five, so a list of what exists, and the check of a recipe's
options, must not import anything. A component registers itself with a decorator whose name and first argument are
literals::

    @register_optimizer("mine", paper="...", lr_scaling="sqrt")
    class Mine(torch.optim.Optimizer):
        def __init__(self, params, *, lr: float = 1e-3, weight_decay: float = 0.0): ...

The registry reads those decorators, and the signature below them, from the source files of its package
(``signatures.py``), and imports a module only when its component is asked for. Adding a component therefore edits no
list. Components of other packages come through entry points (group ``lbzoo.<kind>s``, entry name = registry name) and
through the plugin files of a recipe.

A registry may have *wrappers*: components registered under a prefix that take another component's product. With a
wrapper ``larc_``, every name ``<name>`` also exists as ``larc_<name>``, with the options of both.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from lbzoo.errors import LbzooError, UnknownNameError, UsageError
from lbzoo.signatures import Entry, Option, options_of, scan_source, source_files

T = TypeVar("T")


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
        """Register ``component``; raises UsageError where another source file, or another thing in it, holds the name.

        A wrapped name (``vr_lamb``) is the wrapper's.
        """
        file, line = _definition(component)
        holder = self._holder(name)
        if holder is not None and (holder.rpartition(":")[0] != file or self._is_another(name, component)):
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
                loaded = self._load(self._entry_points[name])
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
        wrapped = self._wrapped(name)
        if wrapped is not None:
            assert self.wrappers is not None
            return {**self.options(wrapped[1]), **self.wrappers.options(wrapped[0])}
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
            return Entry(name, self.kind, point.module, point.attr, _origin(point))
        raise UnknownNameError(self.kind, name, self.names())

    def meta(self, name: str) -> Mapping[str, Any]:
        """The keywords given to the decorator; imports the component, so that values need not be literals."""
        wrapped = self._wrapped(name)
        if wrapped is not None:
            assert self.wrappers is not None
            return {**self.meta(wrapped[1]), **self.wrappers.meta(wrapped[0])}
        self.get(name)
        return self._added[name].meta

    def _load(self, point: importlib.metadata.EntryPoint) -> Any:
        try:
            return point.load()
        except LbzooError:
            raise
        except Exception as error:
            raise UsageError(
                f"the {self.kind} '{point.name}', {_origin(point)}, cannot be loaded from {point.value}: "
                f"{type(error).__name__}: {error}"
            ) from error

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
            None if base.options is None else {**base.options, **self.wrappers.options(prefix)},
        )

    def _holder(self, name: str) -> str | None:
        if name in self._added:
            return f"{self._added[name].file}:{self._added[name].line}"
        if name in self._scanned:
            return self._scanned[name].source
        return self._wrapper_of(name)

    def _wrapper_of(self, name: str) -> str | None:
        """The source of the wrapper that makes ``name`` of a component of this registry's own package, if one does."""
        for prefix, wrapper in (self.wrappers._scanned if self.wrappers is not None else {}).items():
            base = self._scanned.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if base is not None and not set(wrapper.options or ()) & set(base.options or ()):
                return wrapper.source
        return None

    def _is_another(self, name: str, component: Any) -> bool:
        """Whether the file that holds the name gave it to something else. Its module may well run again."""
        added = self._added.get(name)
        return added is not None and added.line > 0 and _name_in_file(added.component) != _name_in_file(component)

    @functools.cached_property
    def _scanned(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for module, path in source_files(self.package):
            for entry in scan_source(path, self.kind, module):
                if entry.name in entries:
                    raise UsageError(f"{entry.source}: '{entry.name}' is taken by {entries[entry.name].source}")
                entries[entry.name] = entry
        return entries

    @functools.cached_property
    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        points: dict[str, importlib.metadata.EntryPoint] = {}
        for point in importlib.metadata.entry_points(group=self.entry_point_group):
            holder = self._scanned[point.name].source if point.name in self._scanned else self._wrapper_of(point.name)
            if point.name in points:
                holder = f"the entry point {points[point.name].value}"
            if holder is not None:
                raise UsageError(f"entry point {point.value}: the {self.kind} name '{point.name}' is taken by {holder}")
            points[point.name] = point
        return points


def _origin(point: importlib.metadata.EntryPoint) -> str:
    return f"entry point of {point.dist.name}" if point.dist else "entry point"


def _wrap(
    wrapper: Callable[..., Any], wrapper_options: Mapping[str, Option], base: Callable[..., Any]
) -> Callable[..., Any]:
    """A factory that gives each option to the one of the two that takes it, and the base's product to the wrapper."""

    def build(target: Any, **options: Any) -> Any:
        own = {name: options.pop(name) for name in wrapper_options if name in options}
        return wrapper(base(target, **options), **own)

    return build


def _definition(component: Any) -> tuple[str, int]:
    """(file, line) where a class or function was defined; the module's name where it has no file."""
    target = inspect.unwrap(component) if callable(component) else component
    try:
        return str(Path(inspect.getfile(target)).resolve()), inspect.getsourcelines(target)[1]
    except (TypeError, OSError):
        return str(getattr(component, "__module__", type(component).__module__)), 0


def _name_in_file(component: Any) -> str | None:
    name: str | None = getattr(inspect.unwrap(component) if callable(component) else component, "__qualname__", None)
    return name


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
