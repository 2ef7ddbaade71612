"""What a stage will come to, before it costs anything; the data's files are not needed."""

from __future__ import annotations

from dataclasses import dataclass

from lbzoo import registry
from lbzoo.errors import LbzooError
from lbzoo.recipe.arithmetic import BatchSum, Shards, batch_sum, lr_arithmetic, shards, steps_arithmetic
from lbzoo.recipe.build import build_data, build_schedule
from lbzoo.recipe.dry_run import dry_run
from lbzoo.recipe.resolved import Component, ResolvedRecipe, Stage


@dataclass(frozen=True)
class ModelSize:
    """One full copy of the model and of its optimizer's state; sharding divides the bytes.

    ``optimizer_bytes`` is None where the optimizer cannot say. ``statistics_bytes``: the sums of squared gradients,
    and of pooled ones, 0 where neither the optimizer nor a callback needs them. ``average_bytes``: of
    ``trainer.ema``, 0 without it.
    """

    parameters: int
    tensors: int
    weight_bytes: int
    optimizer_bytes: int | None
    statistics_bytes: int = 0
    average_bytes: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StagePlan:
    """The numbers of a stage. Steps are optimizer steps, sizes and shards count samples (``unit``).

    ``micro_batch_size`` and ``shards`` are None where the size is found when the run starts.
    """

    name: str
    unit: str
    num_train: int
    global_batch_size: int
    micro_batch_size: int | None
    batches: tuple[BatchSum, ...]
    steps: int
    steps_arithmetic: str
    steps_per_epoch: float
    warmup_steps: int
    constant_steps: int
    schedule: str
    samples: int
    epochs: float
    shards: Shards | None
    optimizer: str
    lr: float | None
    lr_arithmetic: str
    model: ModelSize | None = None
    model_problem: str = ""


def plan_stage(recipe: ResolvedRecipe, stage: Stage, *, count_model: bool = True) -> StagePlan:
    """The numbers of a stage; with ``count_model`` the model is built on the meta device, which imports all of it."""
    schedule = build_schedule(stage)
    samples = stage.steps * stage.global_batch_size
    model, problem = model_size(recipe, stage) if count_model else (None, "")
    return StagePlan(
        name=stage.name,
        unit=build_data(stage).facts().unit,
        num_train=stage.num_train,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=None if stage.finds_micro_batch_size else stage.micro_batch_size,
        batches=_batches(recipe, stage),
        steps=stage.steps,
        steps_arithmetic=steps_arithmetic(stage),
        steps_per_epoch=stage.steps_per_epoch,
        warmup_steps=schedule.warmup_steps,
        constant_steps=schedule.constant_steps,
        schedule=schedule.name,
        samples=samples,
        epochs=samples / stage.num_train,
        shards=None if stage.finds_micro_batch_size else shards(stage),
        optimizer=stage.optimizer.name,
        lr=stage.optimizer.options.get("lr"),
        lr_arithmetic=lr_arithmetic(stage),
        model=model,
        model_problem=problem,
    )


def _batches(recipe: ResolvedRecipe, stage: Stage) -> tuple[BatchSum, ...]:
    """As the paper ran it, where the recipe knows, and on this machine."""
    device, devices = _devices_here(recipe)
    here = batch_sum(stage, where="here", device=device, devices=devices, num_nodes=recipe.trainer.num_nodes)
    paper = recipe.hardware
    if paper is None:
        return (here,)
    then = batch_sum(
        stage,
        where="as the paper ran it",
        device=paper.device,
        devices=paper.devices,
        num_nodes=paper.num_nodes,
    )
    return then, here


def _devices_here(recipe: ResolvedRecipe) -> tuple[str, int]:
    """What ``trainer.devices`` comes to on this machine; a number counts, whether or not so many are here."""
    import torch

    trainer = recipe.trainer
    gpus = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
    device = torch.cuda.get_device_name(0) if gpus else "GPU" if trainer.accelerator == "cuda" else "CPU"
    return device, trainer.devices if isinstance(trainer.devices, int) else gpus or 1


def model_size(recipe: ResolvedRecipe, stage: Stage) -> tuple[ModelSize | None, str]:
    """The sizes of a stage's model, or why there are none: a plan is worth having without them."""
    try:
        built = dry_run(stage)
    except (LbzooError, ImportError, NotImplementedError, RuntimeError) as error:
        return None, str(error)
    sizes = (built.parameters, built.tensors, built.weight_bytes, built.optimizer_bytes)
    statistics = 4 * built.parameters * _floats_of_gradient_stats(recipe, stage)
    average = _average_bytes(recipe, built.parameters)
    return ModelSize(*sizes, statistics_bytes=statistics, average_bytes=average, warnings=built.warnings), ""


def _average_bytes(recipe: ResolvedRecipe, parameters: int) -> int:
    """Averages are float32, but for weights of more."""
    if recipe.trainer.ema is None:
        return 0
    return (8 if recipe.trainer.precision == "64-true" else 4) * parameters


def _floats_of_gradient_stats(recipe: ResolvedRecipe, stage: Stage) -> int:
    """A parameter element: its squares, and a sum where micro-batches are pooled into fewer gradients."""
    if not collects_gradient_stats(recipe, stage):
        return 0
    pooled = [callback.options["groups"] for callback in _collecting(recipe) if callback.options.get("groups")]
    micro_batches = stage.global_batch_size / stage.micro_batch_size
    return 2 if any(groups < micro_batches for groups in pooled) else 1


def collects_gradient_stats(recipe: ResolvedRecipe, stage: Stage) -> bool:
    """Whether a callback or the optimizer looks at the single gradients of a step."""
    from lbzoo.optim import get_optimizer_info

    return bool(_collecting(recipe)) or get_optimizer_info(stage.optimizer.name).needs_gradient_stats


def _collecting(recipe: ResolvedRecipe) -> list[Component]:
    """The callbacks that look at the single gradients."""
    known = [callback for callback in recipe.callbacks if callback.name in registry.callbacks]
    return [each for each in known if registry.callbacks.entry(each.name).meta.get("needs_gradient_stats")]
