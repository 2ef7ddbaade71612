"""From a recipe's name to plain data that an engine runs, or to all of its mistakes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbzoo import scaling
from lbzoo.recipe.build import build_schedule
from lbzoo.recipe.components import check_component, leave_out_foreign
from lbzoo.recipe.finding import find_recipe
from lbzoo.recipe.hashing import training_hash
from lbzoo.recipe.layers import merged_layers
from lbzoo.recipe.merging import STAGE_KEYS, stage_node
from lbzoo.recipe.nodes import Node, Problem, RecipeError
from lbzoo.recipe.plugins import import_plugins, refuse_code
from lbzoo.recipe.reading import leading_comment
from lbzoo.recipe.resolved import Component, ResolvedRecipe, Stage
from lbzoo.recipe.schema import Recipe, Scale
from lbzoo.recipe.settling import StageDraft, check_shards
from lbzoo.recipe.tidying import COMPONENTS
from lbzoo.recipe.validation import validate_block

SINGLE_STAGE = "train"  # the name of the stage of a recipe without `stages`


def load_recipe(
    ref: str | Path,
    overrides: Sequence[str] = (),
    scale: Scale = "paper",
    *,
    row: Mapping[str, Any] | None = None,
    allow_plugins: bool = True,
) -> ResolvedRecipe:
    """A recipe by path or name, settled.

    Args:
        ref: a path, or a name in ``./recipes``, in the package or in another package's entry points.
        overrides: ``key.sub=value`` strings, the strongest layer.
        scale: ``mini`` applies the recipe's ``mini:`` block, ``smoke`` also cuts every stage to two steps.
        row: values of a table's row, between the recipe and its scale block.
        allow_plugins: whether the recipe may import code (``plugins``, ``package.module:Class``).

    Raises:
        RecipeError: with all the mistakes there are, each with its file and line. UsageError for no such recipe.
    """
    path = find_recipe(ref)
    merged, problems = merged_layers(path, overrides, scale, row)
    if not allow_plugins and (refused := refuse_code(merged)):
        raise RecipeError([*problems, *refused])
    plugins, found = import_plugins(merged)
    problems += found

    notes = [note for kind in COMPONENTS if (block := merged.get(kind)) for note in leave_out_foreign(kind, block)]
    settings, found = _check_run(merged)
    problems += found
    callbacks, found = _check_callbacks(merged)
    problems += found
    stages: list[Stage] = []
    for name, node in _stage_nodes(merged):
        draft = StageDraft(name, node)
        stage = draft.settle(settings.trainer if settings is not None else None)
        problems += draft.problems
        notes += draft.notes
        if stage is not None:
            problems += _check_kept_optimizer(stages[-1] if stages else None, stage, node)
            stages.append(stage)
    if problems or settings is None:
        raise RecipeError(problems)

    document = _document_node(merged, plugins)
    numbered = _numbered(stages)
    return ResolvedRecipe(
        name=path.stem,
        path=path,
        scale=scale,
        description=leading_comment(path.read_text(encoding="utf-8-sig")),
        seed=settings.seed,
        stages=numbered,
        callbacks=tuple(callbacks),
        trainer=settings.trainer,
        checkpoint=settings.checkpoint,
        logging=settings.logging,
        plugins=tuple(plugins),
        table=settings.table,
        hardware=settings.hardware,
        expect=settings.expect,
        notes=tuple(dict.fromkeys(notes)),
        document=document.plain(),
        hash=training_hash(settings.seed, numbered, settings.trainer),
        origins={at: node.origin for at, node in document.walk() if at},
    )


def with_sample_counts(recipe: ResolvedRecipe, counts: Mapping[str, int]) -> ResolvedRecipe:
    """The recipe for data of another size than the nominal one: ``counts`` are training samples by stage name.

    Steps of stages that were given in epochs are counted again. Raises UsageError where a stage no longer works out.
    """
    stages = []
    for stage in recipe.stages:
        num_train = counts.get(stage.name, stage.num_train)
        steps = stage.steps
        if stage.epochs is not None:
            steps = scaling.steps_for_epochs(stage.epochs, num_train, stage.global_batch_size)
        changed = dataclasses.replace(stage, num_train=num_train, steps=steps)
        check_shards(changed)
        build_schedule(changed)
        stages.append(changed)
    numbered = _numbered(stages)
    return dataclasses.replace(recipe, stages=numbered, hash=training_hash(recipe.seed, numbered, recipe.trainer))


def with_micro_batch_sizes(recipe: ResolvedRecipe, sizes: Mapping[str, int]) -> ResolvedRecipe:
    """The recipe with the micro-batch sizes, by stage name, that were found where it says ``auto``.

    It is then a recipe that names these sizes: its document and its hash are that one's.
    """
    waiting = [stage.name for stage in recipe.stages if stage.finds_micro_batch_size]
    found = {name: sizes[name] for name in waiting if name in sizes}
    if not found:
        return recipe
    stages = tuple(
        dataclasses.replace(stage, micro_batch_size=found[stage.name], finds_micro_batch_size=False)
        if stage.name in found
        else stage
        for stage in recipe.stages
    )
    for stage in stages:
        check_shards(stage)
    document = copy.deepcopy(recipe.document)
    blocks = {stage["name"]: stage for stage in document.get("stages") or ()} or {SINGLE_STAGE: document}
    for name, size in found.items():
        blocks[name].setdefault("data", {})["micro_batch_size"] = size
    new_hash = training_hash(recipe.seed, stages, recipe.trainer)
    return dataclasses.replace(recipe, stages=stages, document=document, hash=new_hash)


def _check_run(merged: Node) -> tuple[Recipe | None, list[Problem]]:
    """What is not of a stage."""
    shared = {key: node for key, node in merged.value.items() if key not in (*STAGE_KEYS, "stages")}
    settings, problems = validate_block(Recipe, Node(shared, merged.origin))
    stages = merged.get("stages")
    if stages is not None and stages.value is not None and not (stages.is_mapping and stages.value):
        problems.append(Problem(stages.origin, "expected a list of stages, each with a name"))
    return settings, problems


def _check_callbacks(merged: Node) -> tuple[list[Component], list[Problem]]:
    node = merged.get("callbacks")
    components: list[Component] = []
    problems: list[Problem] = []
    for item in node.value if node is not None and node.is_list else []:
        component, found = check_component("callback", item)
        components.append(component)
        problems += found
    return components, problems


def _stage_nodes(merged: Node) -> Iterator[tuple[str, Node]]:
    stages = merged.get("stages")
    if stages is not None and stages.is_mapping:
        for name, stage in stages.value.items():
            yield name, stage_node(merged, stage)
    elif stages is None or stages.value is None:
        shared = {key: node for key, node in merged.value.items() if key in STAGE_KEYS}
        yield SINGLE_STAGE, Node({"name": Node(SINGLE_STAGE, merged.origin), **shared}, merged.origin).copy()


def _check_kept_optimizer(earlier: Stage | None, stage: Stage, node: Node) -> list[Problem]:
    """State that is kept has to be of the same optimizer. The first stage has none to keep."""
    if earlier is None or not stage.keeps_optimizer or earlier.optimizer.name == stage.optimizer.name:
        return []
    optimizer = node.get("optimizer")
    reset = optimizer.get("reset") if optimizer is not None else None
    message = (
        f"stage '{stage.name}' cannot keep the state of '{earlier.optimizer.name}', its optimizer is "
        f"'{stage.optimizer.name}'; leave reset out, or true"
    )
    return [Problem((reset or node).origin, message)]


def _numbered(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    first_steps = [sum(stage.steps for stage in stages[:index]) for index in range(len(stages))]
    return tuple(
        dataclasses.replace(stage, index=index, first_step=first)
        for index, (stage, first) in enumerate(zip(stages, first_steps, strict=True))
    )


def _document_node(merged: Node, plugins: Sequence[Path]) -> Node:
    """The merged recipe in the schema's order, as it can be written to another folder and read again."""
    document: dict[str, Node] = {}
    for key in Recipe.model_fields:
        node = merged.get(key)
        if key == "plugins" and node is not None:
            document[key] = Node([Node(str(path), node.origin) for path in plugins], node.origin)
        elif key == "stages" and node is not None and node.is_mapping:
            document[key] = Node(list(node.value.values()), node.origin)
        elif node is not None:
            document[key] = node
    return Node(document, merged.origin)
