"""A resolved recipe written out as YAML, every value with where it came from.

What is written is a recipe again: steps are counted, the learning rate is scaled, defaults are filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lbzoo.recipe.arithmetic import lr_arithmetic, steps_arithmetic
from lbzoo.recipe.components import component_options
from lbzoo.recipe.nodes import KeyPath, Origin, display_path
from lbzoo.recipe.resolved import Component, ResolvedRecipe, Stage
from lbzoo.recipe.resolving import SINGLE_STAGE
from lbzoo.recipe.tidying import Kind
from lbzoo.recipe.writing import to_yaml
from lbzoo.signatures import REQUIRED

_DEFAULT = Origin("default")
_SCALED_WARMUP = ("warmup_epochs", "warmup_ratio")  # what lr_scaling scales along with the learning rate


@dataclass(frozen=True)
class Line:
    """A line of YAML, and the remark on it."""

    text: str
    remark: str = ""


def annotate(recipe: ResolvedRecipe) -> list[Line]:
    """The lines of the resolved recipe."""
    return list(_Writer(recipe).lines())


def describe_origin(origin: Origin, recipe: ResolvedRecipe) -> str:
    """Where a value came from, in a few words."""
    if origin.source in ("recipe", "base"):
        own = recipe.path is not None and origin.file == display_path(recipe.path)
        place = f"line {origin.line}" if own else f"{Path(origin.file or '').name}:{origin.line}"
        return f"mini, {place}" if origin.path[:1] == ("mini",) else place
    return {
        "override": "override",
        "row": origin.text,
        "scale": origin.text,
        "facts": f"from {origin.text}",
        "default": "default",
    }.get(origin.source, origin.source)


class _Writer:
    def __init__(self, recipe: ResolvedRecipe) -> None:
        self.recipe = recipe

    def lines(self) -> Iterator[Line]:
        recipe = self.recipe
        yield Line("version: 1", self._origin(("version",)))
        yield Line(f"seed: {recipe.seed}", self._origin(("seed",)))
        if recipe.plugins:
            yield Line(f"plugins: {_flow([str(path) for path in recipe.plugins])}", self._origin(("plugins",)))
        if len(recipe.stages) == 1 and recipe.stages[0].name == SINGLE_STAGE:
            yield from self._stage(recipe.stages[0], "")
        else:
            yield Line("stages:")
            for stage in recipe.stages:
                yield Line(f"  - name: {_flow(stage.name)}", self._remark(stage.origins.get(("name",), _DEFAULT)))
                yield from self._stage(stage, "    ")
        for key in ("trainer", "checkpoint", "logging"):
            yield from self._settings(key, getattr(recipe, key))
        yield from self._callbacks()
        for key in ("table", "hardware", "expect"):
            value = getattr(recipe, key)
            if value:
                plain = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else dict(value)
                yield Line(f"{key}: {_flow(plain)}", self._origin((key,)))

    def _stage(self, stage: Stage, indent: str) -> Iterator[Line]:
        yield from self._component("task", stage.task, stage, indent)
        micro = "auto" if stage.finds_micro_batch_size else stage.micro_batch_size
        sizes = {"global_batch_size": stage.global_batch_size, "micro_batch_size": micro}
        yield from self._component("data", stage.data, stage, indent, sizes)
        rules = {"param_rules": list(stage.param_rules)} if stage.param_rules else {}
        yield from self._component("optimizer", stage.optimizer, stage, indent, rules)
        lengths = stage.schedule.model_dump(exclude={"name"}, exclude_none=True)
        yield from self._component("schedule", Component(stage.schedule.name, {}), stage, indent, lengths)
        remark = self._remark(stage.origins.get(("steps",)) or stage.origins.get(("epochs",), _DEFAULT))
        counted = f"{steps_arithmetic(stage)}, " if stage.epochs is not None else ""
        yield Line(f"{indent}steps: {stage.steps}", f"{counted}{remark}")

    def _component(
        self, kind: Kind, component: Component, stage: Stage, indent: str, shared: Mapping[str, Any] | None = None
    ) -> Iterator[Line]:
        """A component's block: its name, the recipe's own keys, its options as set, then those at their defaults."""
        yield Line(f"{indent}{kind}:")
        origins = stage.origins
        yield Line(f"{indent}  name: {_flow(component.name)}", self._remark(origins.get((kind, "name"), _DEFAULT)))
        written = {**(shared or {}), **component.options}
        for key, value in written.items():
            remark = self._remark(origins.get((kind, key), _DEFAULT))
            if stage.lr_scaling is not None and key == "lr":
                remark = f"{lr_arithmetic(stage)}, {remark}"
            elif stage.lr_scaling is not None and stage.lr_scaling.warmup == "linear" and key in _SCALED_WARMUP:
                remark = f"scaled with the batch, {remark}"
            yield Line(f"{indent}  {key}: {_flow(value)}", remark)
        for key, option in component_options(kind, component.name).items():
            if key not in written and option.default is not REQUIRED:
                yield Line(f"{indent}  {key}: {_flow(option.default)}", "default")

    def _settings(self, key: str, settings: BaseModel) -> Iterator[Line]:
        yield Line(f"{key}:")
        for field, value in settings:
            plain = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
            yield Line(f"  {field}: {_flow(plain)}", self._origin((key, field)))

    def _callbacks(self) -> Iterator[Line]:
        if not self.recipe.callbacks:
            yield Line("callbacks: []", self._origin(("callbacks",)))
            return
        yield Line("callbacks:")
        for index, callback in enumerate(self.recipe.callbacks):
            options = component_options("callback", callback.name)
            defaults = {
                key: option.default
                for key, option in options.items()
                if option.default is not REQUIRED and key not in callback.options
            }
            origin = self._origin(("callbacks", index))
            yield Line(f"  - name: {_flow(callback.name)}", origin)
            for key, value in callback.options.items():
                yield Line(f"    {key}: {_flow(value)}", self._origin(("callbacks", index, key)))
            for key, value in defaults.items():
                yield Line(f"    {key}: {_flow(value)}", "default")

    def _origin(self, path: KeyPath) -> str:
        origin = self.recipe.origins.get(path)
        return self._remark(origin) if origin is not None else "default"

    def _remark(self, origin: Origin) -> str:
        return describe_origin(origin, self.recipe)


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    return to_yaml(value, one_line=True)
