"""The JSON schema of recipe files, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lbzoo.recipe.components import REGISTRIES, component_options
from lbzoo.recipe.merging import SHARED_KEYS, STAGE_KEYS
from lbzoo.recipe.schema import DataSettings, OptimizerSettings, Recipe, ScheduleSettings
from lbzoo.recipe.tidying import COMPONENTS, Kind
from lbzoo.recipe.validation import json_schema_of
from lbzoo.signatures import REQUIRED

_SHARED: dict[Kind, type[BaseModel] | None] = {
    "task": None,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
    "callback": None,
}


def recipe_schema() -> dict[str, Any]:
    """Keys with their types and descriptions; the options of a component follow its name."""
    schema = Recipe.model_json_schema()
    definitions, properties = schema["$defs"], schema["properties"]
    for kind in (*COMPONENTS, "callback"):
        definitions[kind] = _component(kind, definitions)
    for kind in COMPONENTS:
        properties[kind] = {"description": properties[kind].get("description", ""), "$ref": f"#/$defs/{kind}"}
    properties["callbacks"]["items"] = {"$ref": "#/$defs/callback"}
    definitions["stage"] = _block({"name": {"type": "string"}, **{key: properties[key] for key in STAGE_KEYS}})
    stage = {"$ref": "#/$defs/stage"}
    in_order, by_name = {"type": "array", "items": stage}, {"type": "object", "additionalProperties": stage}
    properties["stages"]["anyOf"] = [in_order, by_name]
    changes = {key: value for key, value in properties.items() if key not in ("version", "base", "mini")}
    properties["mini"]["anyOf"] = [_block(changes), {"type": "null"}]
    for unused in ("ComponentSettings", "StageSettings"):
        del definitions[unused]
    return {
        **schema,
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lbzoo recipe",
        "required": ["version"],
    }


def _block(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _component(kind: Kind, definitions: dict[str, Any]) -> dict[str, Any]:
    """A name alone, or a block whose further keys depend on the name."""
    found = REGISTRIES[kind]
    names = found.names()
    shared = _shared_properties(kind, definitions)
    name = {"anyOf": [{"enum": names}, {"type": "string", "pattern": ":", "description": "package.module:Class"}]}
    by_name = [
        {
            "if": {"properties": {"name": {"const": each}}, "required": ["name"]},
            "then": {
                "description": found.entry(each).first_line,
                **_block({"name": True, **shared, **_options(kind, each)}),
            },
        }
        for each in names
    ]
    return {"anyOf": [name, {"type": "object", "properties": {"name": name, **shared}, "allOf": by_name}]}


def _shared_properties(kind: Kind, definitions: dict[str, Any]) -> dict[str, Any]:
    model = _SHARED[kind]
    if model is None:
        return {}
    schema = model.model_json_schema()
    definitions.update(schema.get("$defs", {}))
    return {key: value for key, value in schema["properties"].items() if key != "name" and key in SHARED_KEYS[kind]}


def _options(kind: Kind, name: str) -> dict[str, Any]:
    properties = {}
    for key, option in component_options(kind, name).items():
        described = json_schema_of(option.annotation)
        if option.default is not REQUIRED:
            described = {**described, "default": _json_default(option.default)}
        properties[key] = described
    return properties


def _json_default(value: Any) -> Any:
    """A default as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
