"""Code that a recipe brings along: plugin files, and components named ``package.module:Class``."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

from lbzoo.errors import LbzooError, UsageError
from lbzoo.recipe.finding import is_file
from lbzoo.recipe.nodes import Node, Problem
from lbzoo.recipe.tidying import COMPONENTS

_NO_CODE = ("torch:", "timm:")  # optimizers of libraries, not code of the recipe's choice


def import_plugins(merged: Node) -> tuple[list[Path], list[Problem]]:
    """The plugin files of a merged recipe, imported; each is relative to the file that names it."""
    plugins, problems = [], []
    for item in _plugin_items(merged):
        path = Path(item.value)
        if item.origin.file is not None:
            path = Path(item.origin.file).parent / path
        try:
            plugins.append(import_plugin(path))
        except UsageError as error:
            problems.append(Problem(item.origin, str(error)))
    return plugins, problems


def import_plugin(path: Path) -> Path:
    """Run a Python file that registers components, and return its full path. It may import its neighbours.

    A file is run once, however many recipes name it. Raises UsageError that names the line where it failed.
    """
    if not is_file(path):
        raise UsageError(f"no file {path}")
    path = path.resolve()
    name = f"lbzoo_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # the same in every process
    if name in sys.modules:
        return path
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path.name} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that was never meant to be imported leaves with sys.exit()
        del sys.modules[name]
        if isinstance(error, LbzooError):
            raise
        raise UsageError(f"{path.name} failed{_line_in(path, error)}: {type(error).__name__}: {error}") from error
    return path


def refuse_code(merged: Node) -> list[Problem]:
    """Every place where a recipe would have code imported."""
    places = [(item, item.value) for item in _plugin_items(merged)]
    places += [(name, name.value) for name in _component_names(merged) if _is_code(name.value)]
    places += [(logger, logger.value) for logger in _loggers(merged) if _is_code(logger.value)]
    return [Problem(node.origin, f"'{value}' is code, which --no-plugins refuses") for node, value in places]


def _plugin_items(merged: Node) -> list[Node]:
    """The items of ``plugins`` that can be paths; what else stands there the validation of the recipe reports."""
    node = merged.get("plugins")
    items = node.value if node is not None and node.is_list else []
    return [item for item in items if isinstance(item.value, str)]


def _component_names(merged: Node) -> Iterator[Node]:
    stages, callbacks = merged.get("stages"), merged.get("callbacks")
    blocks = [merged, *(stages.value.values() if stages is not None and stages.is_mapping else [])]
    components = [component for block in blocks for kind in COMPONENTS if (component := block.get(kind))]
    components += callbacks.value if callbacks is not None and callbacks.is_list else []
    return (name for component in components if (name := component.get("name")))


def _loggers(merged: Node) -> list[Node]:
    logging = merged.get("logging")
    loggers = logging.get("loggers") if logging is not None and logging.is_mapping else None
    return list(loggers.value) if loggers is not None and loggers.is_list else []


def _is_code(name: object) -> bool:
    return ":" in str(name) and not str(name).startswith(_NO_CODE)


def _line_in(path: Path, error: BaseException) -> str:
    """Where in the file an exception came from: the last of its frames that is in the file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" on line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" on line {lines[-1]}" if lines else ""
