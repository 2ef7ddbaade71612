"""One stage of a merged recipe settled: components checked, data facts filled in, rate scaled, steps counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lbzoo import scaling
from lbzoo.data.base import DataFacts
from lbzoo.errors import UsageError
from lbzoo.recipe.build import build_schedule
from lbzoo.recipe.components import check_component, check_rules, component_class, leave_out_foreign
from lbzoo.recipe.nodes import KeyPath, Node, Origin, Problem
from lbzoo.recipe.resolved import Component, Stage
from lbzoo.recipe.schema import LENGTH_KEYS, ScheduleSettings, StageSettings, TrainerSettings
from lbzoo.recipe.tidying import COMPONENTS, Kind
from lbzoo.recipe.validation import validate_block


@dataclass
class StageDraft:
    """A stage on its way, with all that was found wrong with it and all that was changed."""

    name: str
    node: Node
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _components: dict[str, Component] = field(default_factory=dict)

    def settle(self, trainer: TrainerSettings | None) -> Stage | None:
        """The stage; None where there are problems. Its number and first step are not known yet."""
        for kind in COMPONENTS:
            if (block := self.node.get(kind)) is not None:
                self.notes += leave_out_foreign(kind, block)
        self._check("data")
        facts = self._facts() if not self.problems else None
        self._check("task", _given(facts))
        self._check("optimizer")
        self._check("schedule")
        if (optimizer := self.node.get("optimizer")) is not None:
            self.problems += check_rules(self._components["optimizer"].name, optimizer.get("param_rules"))
        settings = self._settings()
        if settings is None or facts is None or self.problems:
            return None
        return self._stage(settings, facts, trainer or TrainerSettings())

    def _check(self, kind: Kind, given: Mapping[str, Any] | None = None) -> None:
        block = self.node.get(kind)
        self._components[kind] = Component("")
        if block is not None:
            self._components[kind], found = check_component(kind, block, given)
            self.problems += found

    def _facts(self) -> DataFacts | None:
        component = self._components["data"]
        if not component.name:
            return None
        try:
            facts: DataFacts = component_class("data", component.name)(**component.options).facts()
        except UsageError as error:
            self._report(str(error), "data")
            return None
        except (TypeError, ValueError, ImportError) as error:
            self._report(f"data '{component.name}': {error}", "data")
            return None
        return facts

    def _settings(self) -> StageSettings | None:
        settings, problems = validate_block(StageSettings, self.node)
        self.problems += problems
        lengths = [key for key in LENGTH_KEYS if (node := self.node.get(key)) is not None and node.value is not None]
        if not lengths:
            self._report("the recipe does not say how long to train: give epochs or steps")
        elif len(lengths) > 1:
            self._report("give steps or epochs, not both", lengths[1])
        return settings

    def _stage(self, settings: StageSettings, facts: DataFacts, trainer: TrainerSettings) -> Stage | None:
        optimizer, schedule = self._components["optimizer"], settings.schedule
        if settings.lr_scaling is not None:
            try:
                optimizer, schedule = _scaled(settings, optimizer)
            except UsageError as error:
                self._report(str(error), "lr_scaling")
                return None
        stage = Stage(
            name=self.name,
            index=0,
            task=self._components["task"],
            data=self._components["data"],
            optimizer=optimizer,
            param_rules=self._rules(),
            schedule=schedule,
            global_batch_size=settings.data.global_batch_size,
            micro_batch_size=1 if settings.data.micro_batch_size == "auto" else settings.data.micro_batch_size,
            finds_micro_batch_size=settings.data.micro_batch_size == "auto",
            steps=_count_steps(settings, facts),
            first_step=0,
            num_train=facts.num_train,
            keeps_optimizer=not settings.optimizer.reset,
            epochs=settings.epochs,
            lr_before_scaling=self._components["optimizer"].options.get("lr"),
            lr_scaling=settings.lr_scaling,
            origins=self._origins(),
        )
        self._run_check(lambda: _check_batch(stage, trainer), "data", "global_batch_size")
        self._run_check(lambda: build_schedule(stage), "schedule")
        return None if self.problems else stage

    def _rules(self) -> tuple[dict[str, Any], ...]:
        optimizer = self.node.get("optimizer")
        rules = optimizer.get("param_rules") if optimizer is not None else None
        return tuple(rules.plain()) if rules is not None else ()

    def _origins(self) -> dict[KeyPath, Origin]:
        """Where every value of the stage comes from: as written, and what the data's facts filled in."""
        origins = {path: node.origin for path, node in self.node.walk() if path}
        filled = Origin("facts", text=self._components["data"].name)
        for option in self._components["task"].options:
            origins.setdefault(("task", option), filled)
        return origins

    def _run_check(self, check: Callable[[], object], *path: str) -> None:
        try:
            check()
        except UsageError as error:
            self._report(str(error), *path)

    def _report(self, message: str, *path: str) -> None:
        """A problem with the value at ``path``, or with the nearest block around it where it is not written."""
        node = self.node
        for key in path:
            node = node.get(key) or node
        self.problems.append(Problem(node.origin, message))


def check_shards(stage: Stage) -> None:
    """Raise UsageError where there are not samples enough for the virtual shards."""
    if stage.finds_micro_batch_size:
        return  # only sizes are tried that make few enough
    shards = stage.global_batch_size // stage.micro_batch_size
    if stage.num_train < shards:
        raise UsageError(
            f"data '{stage.data.name}' has {stage.num_train} training samples, fewer than the {shards} micro-batches "
            f"of a step; make global_batch_size smaller or micro_batch_size larger"
        )


def _check_batch(stage: Stage, trainer: TrainerSettings) -> None:
    """Whether the global batch divides into micro-batches, and those among the devices where the recipe counts them."""
    scaling.accumulation(
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        world_size=trainer.devices * trainer.num_nodes if isinstance(trainer.devices, int) else 1,
    )
    check_shards(stage)


def _count_steps(settings: StageSettings, facts: DataFacts) -> int:
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return scaling.steps_for_epochs(settings.epochs, facts.num_train, settings.data.global_batch_size)


def _given(facts: DataFacts | None) -> dict[str, Any]:
    """The facts that fill a task's options of the same name; None for each while the facts are not known."""
    if facts is None:
        return {field.name: None for field in dataclasses.fields(DataFacts)}
    values = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return {name: value for name, value in values.items() if value is not None}


def _scaled(settings: StageSettings, optimizer: Component) -> tuple[Component, ScheduleSettings]:
    """Learning rate by the rule; warmup in epochs or as a ratio linearly, so that its steps stay, or not at all."""
    rule, schedule = settings.lr_scaling, settings.schedule
    assert rule is not None
    lr = optimizer.options.get("lr")
    if lr is None:
        raise UsageError("scales optimizer.lr, which the recipe does not set")
    sizes = {
        "base_global_batch_size": rule.base_global_batch_size,
        "global_batch_size": settings.data.global_batch_size,
    }
    warmup = {
        key: scaling.scaled_warmup_epochs(length, **sizes)
        for key in ("warmup_epochs", "warmup_ratio")
        if rule.warmup == "linear" and (length := getattr(schedule, key)) is not None
    }
    scaled_lr = scaling.scaled_lr(lr, rule=rule.rule, **sizes)
    return Component(optimizer.name, {**optimizer.options, "lr": scaled_lr}), schedule.model_copy(update=warmup)
