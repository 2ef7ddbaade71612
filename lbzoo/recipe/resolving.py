"""A merged recipe settled into plain data: components checked, data facts filled in, rates scaled, steps counted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbzoo import scaling
from lbzoo.data.base import DataFacts
from lbzoo.errors import UsageError
from lbzoo.recipe.build import build_schedule
from lbzoo.recipe.components import (
    check_component,
    check_rules,
    component_class,
    import_plugin,
    leave_out_foreign,
)
from lbzoo.recipe.finding import find_recipe
from lbzoo.recipe.layers import merged_layers
from lbzoo.recipe.merging import STAGE_KEYS, stage_node
from lbzoo.recipe.nodes import Node, Origin, Problem, RecipeError
from lbzoo.recipe.reading import leading_comment
from lbzoo.recipe.resolved import Component, ResolvedRecipe, Stage
from lbzoo.recipe.schema import LENGTH_KEYS, Recipe, Scale, ScheduleSettings, StageSettings, TrainerSettings
from lbzoo.recipe.tidying import COMPONENTS
from lbzoo.recipe.validation import validate_block

SINGLE_STAGE = "train"  # the name of the stage of a recipe without `stages`
# Options that say where data lies do not change what is trained on it.
_LOCATIONS = ("root", "path", "folder")


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
    plugins, found = _import_plugins(merged, allow_plugins)
    problems += found
    if not allow_plugins and (refused := list(_foreign_names(merged))):
        raise RecipeError([*problems, *refused])

    notes = [note for kind in COMPONENTS if (block := merged.get(kind)) for note in leave_out_foreign(kind, block)]
    settings, found = _check_run(merged)
    problems += found
    callbacks, found = _check_callbacks(merged)
    problems += found
    stages: list[Stage] = []
    for name, node in _stage_nodes(merged):
        draft = _StageDraft(name, node)
        problems += draft.problems
        notes += draft.notes
        if draft.stage is not None and settings is not None:
            problems += _check_batch(draft, settings.trainer)
            stages.append(draft.stage)
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
        hash=_training_hash(settings.seed, numbered, settings.trainer),
        origins={path: node.origin for path, node in document.walk() if path},
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
        _check_shards(changed)
        build_schedule(changed)
        stages.append(changed)
    numbered = _numbered(stages)
    return dataclasses.replace(recipe, stages=numbered, hash=_training_hash(recipe.seed, numbered, recipe.trainer))


# --- the run ----------------------------------------------------------------------------------------------------------


def _import_plugins(merged: Node, allowed: bool) -> tuple[list[Path], list[Problem]]:
    """The plugin files, imported; each is relative to the file that names it."""
    plugins, problems = [], []
    node = merged.get("plugins")
    for item in node.value if node is not None and node.is_list else []:
        if not isinstance(item.value, str):
            continue  # said by the validation of the recipe
        path = Path(item.value)
        if item.origin.file is not None:
            path = Path(item.origin.file).parent / path
        if not allowed:
            problems.append(Problem(item.origin, f"'{item.value}' is code, which --no-plugins refuses"))
            continue
        try:
            import_plugin(path)
            plugins.append(path.resolve())
        except UsageError as error:
            problems.append(Problem(item.origin, str(error)))
    return plugins, problems


def _foreign_names(merged: Node) -> Iterator[Problem]:
    """Components that are named as code to import."""
    stages = merged.get("stages")
    blocks = [merged, *(stages.value.values() if stages is not None and stages.is_mapping else [])]
    callbacks = merged.get("callbacks")
    components = [component for block in blocks for kind in COMPONENTS if (component := block.get(kind))]
    components += callbacks.value if callbacks is not None and callbacks.is_list else []
    for component in components:
        name = component.get("name")
        if name is not None and ":" in str(name.value) and not str(name.value).startswith(("torch:", "timm:")):
            yield Problem(name.origin, f"'{name.value}' is code, which --no-plugins refuses")


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


def _training_hash(seed: int, stages: Sequence[Stage], trainer: TrainerSettings) -> str:
    """Of what changes the training. Devices, engine, logging, checkpoints and callbacks do not."""
    facts = {
        "seed": seed,
        "precision": trainer.precision,
        "gradient_clip_norm": trainer.gradient_clip_norm,
        "stages": [_training_facts(stage) for stage in stages],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _training_facts(stage: Stage) -> dict[str, Any]:
    data = {option: value for option, value in stage.data.options.items() if option not in _LOCATIONS}
    return {
        "task": [stage.task.name, stage.task.options],
        "data": [stage.data.name, data],
        "optimizer": [stage.optimizer.name, stage.optimizer.options, stage.param_rules],
        "schedule": stage.schedule.model_dump(exclude_none=True),
        "global_batch_size": stage.global_batch_size,
        "micro_batch_size": stage.micro_batch_size,
        "steps": stage.steps,
        "num_train": stage.num_train,
    }


# --- a stage ----------------------------------------------------------------------------------------------------------


class _StageDraft:
    """One stage on its way: ``stage`` is None where ``problems`` kept it from being settled."""

    def __init__(self, name: str, node: Node) -> None:
        self.name, self.node = name, node
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.components: dict[str, Component] = {}
        self.stage: Stage | None = None

        for kind in COMPONENTS:
            if (block := node.get(kind)) is not None:
                self.notes += leave_out_foreign(kind, block)
        self._check("data")
        facts = self._facts() if not self.problems else None
        self._check("task", _given(facts))
        self._check("optimizer")
        self._check("schedule")
        if (optimizer := node.get("optimizer")) is not None:
            self.problems += check_rules(self.components["optimizer"].name, optimizer.get("param_rules"))
        settings = self._settings()
        if settings is not None and facts is not None and not self.problems:
            self._settle(settings, facts)

    def origin(self, *path: str) -> Origin:
        """Where the value at ``path`` is written; the nearest block around it where it is not."""
        node = self.node
        for key in path:
            below = node.get(key)
            if below is None:
                break
            node = below
        return node.origin

    def _check(self, kind: Any, given: Mapping[str, Any] | None = None) -> None:
        block = self.node.get(kind)
        self.components[kind] = Component("")
        if block is not None:
            self.components[kind], found = check_component(kind, block, given)
            self.problems += found

    def _facts(self) -> DataFacts | None:
        component = self.components["data"]
        if not component.name:
            return None
        try:
            source = component_class("data", component.name)(**component.options)
            facts: DataFacts = source.facts()
        except UsageError as error:
            self.problems.append(Problem(self.origin("data"), str(error)))
            return None
        except (TypeError, ValueError, ImportError) as error:
            self.problems.append(Problem(self.origin("data"), f"data '{component.name}': {error}"))
            return None
        return facts

    def _settings(self) -> StageSettings | None:
        settings, problems = validate_block(StageSettings, self.node)
        self.problems += problems
        lengths = [key for key in LENGTH_KEYS if (node := self.node.get(key)) is not None and node.value is not None]
        if not lengths:
            message = "the recipe does not say how long to train: give epochs or steps"
            self.problems.append(Problem(self.node.origin, message))
        elif len(lengths) > 1:
            self.problems.append(Problem(self.origin(lengths[1]), "give steps or epochs, not both"))
        return settings

    def _settle(self, settings: StageSettings, facts: DataFacts) -> None:
        optimizer, schedule = self.components["optimizer"], settings.schedule
        lr = optimizer.options.get("lr")
        if settings.lr_scaling is not None:
            try:
                optimizer, schedule = _scaled(settings, optimizer)
            except UsageError as error:
                self.problems.append(Problem(self.origin("lr_scaling"), str(error)))
                return
        data = settings.data
        steps = settings.steps
        if steps is None:
            assert settings.epochs is not None
            steps = scaling.steps_for_epochs(settings.epochs, facts.num_train, data.global_batch_size)
        written = self.node.get("optimizer")
        rules = written.get("param_rules") if written is not None else None
        stage = Stage(
            name=self.name,
            index=0,
            task=self.components["task"],
            data=self.components["data"],
            optimizer=optimizer,
            param_rules=tuple(rules.plain()) if rules is not None else (),
            schedule=schedule,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            steps=steps,
            first_step=0,
            num_train=facts.num_train,
            epochs=settings.epochs,
            lr_before_scaling=lr,
            lr_scaling=settings.lr_scaling,
            origins=self._origins(),
        )
        try:
            build_schedule(stage)
        except UsageError as error:
            self.problems.append(Problem(self.origin("schedule"), str(error)))
            return
        self.stage = stage

    def _origins(self) -> dict[tuple[str | int, ...], Origin]:
        """Where every value of the stage comes from: as written, and what the data's facts filled in."""
        origins = {path: node.origin for path, node in self.node.walk() if path}
        filled = Origin("facts", text=self.components["data"].name)
        for option in self.components["task"].options:
            origins.setdefault(("task", option), filled)
        return origins


def _given(facts: DataFacts | None) -> dict[str, Any]:
    """The facts that fill a task's options of the same name."""
    if facts is None:
        return {field.name: None for field in dataclasses.fields(DataFacts)}
    values = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return {name: value for name, value in values.items() if value is not None}


def _scaled(settings: StageSettings, optimizer: Component) -> tuple[Component, ScheduleSettings]:
    """Learning rate by the rule, warmup in epochs or as a ratio linearly: the warmup steps stay what they were."""
    rule = settings.lr_scaling
    assert rule is not None
    lr = optimizer.options.get("lr")
    if lr is None:
        raise UsageError("scales optimizer.lr, which the recipe does not set")
    sizes = {
        "base_global_batch_size": rule.base_global_batch_size,
        "global_batch_size": settings.data.global_batch_size,
    }
    scaled = scaling.scaled_lr(lr, rule=rule.rule, **sizes)
    warmup = {
        key: scaling.scaled_warmup_epochs(value, **sizes)
        for key in ("warmup_epochs", "warmup_ratio")
        if (value := getattr(settings.schedule, key)) is not None
    }
    return (
        Component(optimizer.name, {**optimizer.options, "lr": scaled}),
        settings.schedule.model_copy(update=warmup),
    )


def _check_batch(draft: _StageDraft, trainer: TrainerSettings) -> list[Problem]:
    """Whether the global batch divides into micro-batches, and those among the devices where the recipe counts them."""
    stage = draft.stage
    assert stage is not None
    world_size = trainer.devices * trainer.num_nodes if isinstance(trainer.devices, int) else 1
    try:
        scaling.accumulation(
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
            world_size=world_size,
        )
        _check_shards(stage)
    except UsageError as error:
        return [Problem(draft.origin("data", "global_batch_size"), str(error))]
    return []


def _check_shards(stage: Stage) -> None:
    shards = stage.global_batch_size // stage.micro_batch_size
    if stage.num_train < shards:
        raise UsageError(
            f"data '{stage.data.name}' has {stage.num_train} training samples, fewer than the {shards} micro-batches "
            f"of a step; make global_batch_size smaller or micro_batch_size larger"
        )
