"""Layers of a recipe into one: base < recipe < table row < scale block < command line, then top level < stage.

Mappings merge key by key, anything else replaces what was below it. Three things are special:

- Where a layer changes a component's name, options from below stay in the tree, marked with the name they were written
  for; once all layers are in, those that the new component lacks are left out (``components.leave_out_foreign``).
- Of keys that exclude each other (steps and epochs, the three ways to give a warmup) the layer's own choice wins.
- A list of stages says which stages run, each over the stage of that name below; a mapping changes those there are.

Layers are tidied first (``tidying.py``).
"""

from __future__ import annotations

from lbzoo.errors import did_you_mean
from lbzoo.recipe.nodes import Node, Problem
from lbzoo.recipe.schema import (
    CONSTANT_KEYS,
    LENGTH_KEYS,
    WARMUP_KEYS,
    DataSettings,
    OptimizerSettings,
    ScheduleSettings,
)
from lbzoo.recipe.tidying import COMPONENTS, StageList

STAGE_KEYS = (*COMPONENTS, "lr_scaling", *LENGTH_KEYS)
# Keys of a component's block that belong to the recipe and not to the component.
SHARED_KEYS = {
    "task": frozenset({"name"}),
    "data": frozenset(DataSettings.model_fields),
    "optimizer": frozenset(OptimizerSettings.model_fields),
    "schedule": frozenset(ScheduleSettings.model_fields),
    "callback": frozenset({"name"}),
}
_REPLACED = ("callbacks", "table", "hardware", "expect")  # never merged with what is below
_EXCLUSIVE = {
    None: (LENGTH_KEYS,),
    "mini": (LENGTH_KEYS,),
    "schedule": (WARMUP_KEYS, CONSTANT_KEYS),
    "validate_every": (LENGTH_KEYS,),
}


def merge(low: Node, high: Node, key: str | None = None) -> Node:
    """``high`` over ``low``; neither is changed. ``key`` is the name of the block, None for a recipe or a stage."""
    if not (low.is_mapping and high.is_mapping) or key in _REPLACED:
        return high.copy()
    merged = _marked(low, high, key) if key in SHARED_KEYS else dict(low.value)
    for group in _EXCLUSIVE.get(key, ()):
        if any(name in group and node.value is not None for name, node in high.value.items()):
            merged = {name: node for name, node in merged.items() if name not in group}
    for name, node in high.value.items():
        below = merged.get(name)
        if below is None:
            merged[name] = node.copy()
        elif name == "stages" and key in (None, "mini"):
            merged[name] = _merge_stages(below, node)
        elif name == "plugins" and key is None:
            merged[name] = _joined(below, node)
        else:
            merged[name] = merge(below, node, name)
    return Node(merged, high.origin, high.component)


def stage_node(root: Node, stage: Node) -> Node:
    """A stage in full: the top level's task, data, optimizer, schedule and length, changed by the stage's own."""
    shared = {key: node for key, node in root.value.items() if key in STAGE_KEYS}
    return merge(Node(shared, root.origin), stage).copy()


def refuse_unknown_stages(root: Node, layer: Node) -> list[Problem]:
    """Take the stages out of ``layer`` that it changes by name although ``root`` has none of that name."""
    stages = layer.get("stages")
    if stages is None or not stages.is_mapping or isinstance(stages.value, StageList):
        return []
    there = root.get("stages")
    known = list(there.value) if there is not None and there.is_mapping else []
    unknown = {name: node for name, node in stages.value.items() if name not in known}
    stages.value = {name: node for name, node in stages.value.items() if name in known}
    if not stages.value:
        del layer.value["stages"]
    return [
        Problem(node.origin, f"no stage named '{name}'{did_you_mean(name, known) or '; this recipe has no stages'}")
        for name, node in unknown.items()
    ]


def _marked(low: Node, high: Node, key: str | None) -> dict[str, Node]:
    """The items of ``low``; options are marked with its name where ``high`` names another component."""
    name, new = low.get("name"), high.get("name")
    if key is None or name is None or new is None or name.value == new.value:
        return dict(low.value)
    kept = SHARED_KEYS[key] - {"param_rules"}
    return {
        option: node if option in kept else Node(node.value, node.origin, node.component or str(name.value))
        for option, node in low.value.items()
    }


def _joined(low: Node, high: Node) -> Node:
    """The plugins of both: a recipe over a base needs the base's plugins as well."""
    if not (low.is_list and high.is_list) or high.origin.source == "override":
        return high.copy()
    return Node([*low.copy().value, *high.copy().value], high.origin)


def _merge_stages(low: Node, high: Node) -> Node:
    if not (low.is_mapping and high.is_mapping):
        return high.copy()
    stages = type(low.value)() if isinstance(high.value, StageList) else type(low.value)(low.value)
    for name, stage in high.value.items():
        stages[name] = merge(low.value[name], stage) if name in low.value else stage.copy()
    return Node(stages, high.origin)
