"""FSDP2 and HSDP: the one place where a task's parameters are sharded, for every engine.

What came out is checked against what the recipe asked for, before the first step: a parameter that stayed whole, or
lies on another mesh, would train on without a word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm

from lbzoo.engines.launch import World
from lbzoo.engines.layers import unit_layers
from lbzoo.errors import LbzooError, UsageError
from lbzoo.gsnr import attached_stats
from lbzoo.recipe.schema import FsdpSettings, TrainerSettings
from lbzoo.sharding import is_sharded_over
from lbzoo.tasks.base import Task

_TRUE = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def shard(task: Task, world: World, settings: TrainerSettings) -> None:
    """Shard the task in place over all ranks, each unit of its policy by itself; nothing if it is sharded already.

    Before: the process group stands, and all ranks hold the same weights. After: ``training_step`` and the other steps
    gather what they need, as ``forward`` does, and ``configure_optimizers`` finds the sharded parameters. Weights of a
    ``*-true`` precision are converted to it.

    Raises UsageError where a pattern matches no layer, a parameter has no dimension to shard, or two units share one.
    """
    if isinstance(task, FSDPModule):
        return
    options = settings.fsdp or FsdpSettings()
    units = unit_layers(task, options.layers)
    if settings.precision in _TRUE:
        task.to(_TRUE[settings.precision])
    for parameter in task.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no weights in channels_last; activations may stay so
    _refuse_scalars(task)
    _refuse_ties(task, units)
    mesh = _mesh(world, options)
    reshard = _reshard_after_forward(task, options)
    for layer in units.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=_mixed_precision(layer, settings))
    fully_shard(task, mesh=mesh, mp_policy=_mixed_precision(task, settings))
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        register_fsdp_forward_method(task, step)
    _check(task, mesh, len(units) + 1)


def sharded_units(module: nn.Module) -> Iterator[FSDPModule]:
    """The units that are gathered one at a time; none where nothing is sharded."""
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))


def free_gathered_weights(module: nn.Module) -> None:
    """Leave only the shards: after a forward pass without a backward pass the root's weights stay gathered.

    Whoever looks at the parameters then, or changes them, must find those that are trained.
    """
    for unit in sharded_units(module):
        unit.reshard()


@contextmanager
def without_reduction(module: nn.Module) -> Generator[None, None, None]:
    """Around each micro-batch of a step but the last: its backward pass does not reduce the gradients.

    They add up to the whole gradient on every rank, which saves their communication, unless gradient statistics are
    being collected: those need every micro-batch's.
    """
    stats = attached_stats(module)
    _set_reduction(module, stats is not None and stats.is_collecting)
    try:
        yield
    finally:
        _set_reduction(module, True)


def _set_reduction(module: nn.Module, reduces: bool) -> None:
    for unit in sharded_units(module):
        unit.set_requires_gradient_sync(reduces, recurse=False)


def _mesh(world: World, options: FsdpSettings) -> DeviceMesh:
    """[ranks], or [groups, ranks of a group] for HSDP: neighbours share a copy, as they share a machine."""
    size = options.shard_size or world.world_size
    if size == world.world_size:
        return init_device_mesh(world.accelerator, (size,), mesh_dim_names=("shard",))
    shape = (world.world_size // size, size)
    return init_device_mesh(world.accelerator, shape, mesh_dim_names=("replicate", "shard"))


def _reshard_after_forward(task: Task, options: FsdpSettings) -> bool:
    if not task.loss_reads_weights:
        return options.reshard_after_forward is not False
    if options.reshard_after_forward:
        raise UsageError(
            f"trainer.fsdp.reshard_after_forward: the loss of {type(task).__name__} reads the weights after their "
            "layers' forward pass (an L2 term), when they would be freed; leave it out, or set it to false"
        )
    return False


def _mixed_precision(layer: nn.Module, settings: TrainerSettings) -> MixedPrecisionPolicy:
    """Gradients are reduced in float32 at least; under autocast, weights travel in the type they are multiplied in.

    BatchNorm takes no half-precision weights beside its float32 statistics: a unit that has one travels in float32.
    """
    half = _MIXED.get(settings.precision)
    if half is not None and any(isinstance(module, _BatchNorm) for module in _own_modules(layer)):
        half = None
    reduce = None if settings.precision == "64-true" else torch.float32
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduce, cast_forward_inputs=False)


def _own_modules(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer and what lies in it, without the units in it that are sharded already."""
    yield layer
    for child in layer.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _refuse_scalars(task: Task) -> None:
    scalars = [name for name, parameter in task.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UsageError(
            f"strategy: fsdp: parameter '{scalars[0]}' has no dimension to shard; give it the shape [1], or use ddp"
        )


def _refuse_ties(task: Task, units: Mapping[str, nn.Module]) -> None:
    """A parameter that two units share would become two parameters."""
    owners: dict[nn.Parameter, dict[str, str]] = defaultdict(dict)  # by unit: a name
    for name, parameter in task.named_parameters(remove_duplicate=False):
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "the rest of the model")
        owners[parameter][unit] = name
    for names in owners.values():
        if len(names) > 1:
            units_text, names_text = " and ".join(names), " and ".join(f"'{name}'" for name in names.values())
            raise UsageError(
                f"strategy: fsdp: {names_text} are one parameter in two units ({units_text}); name layers in "
                "trainer.fsdp.layers so that one unit, or none, has both"
            )


def _check(task: Task, mesh: DeviceMesh, units: int) -> None:
    """Raise LbzooError if FSDP2 has made something else of the task than was asked for."""
    whole = [name for name, parameter in task.named_parameters() if not is_sharded_over(parameter, mesh)]
    made = sum(1 for _ in sharded_units(task))
    if whole or made != units:
        what = f"'{whole[0]}' is not sharded over {mesh}" if whole else f"there are {made} units and not {units}"
        raise LbzooError(f"strategy: fsdp has come to something else: {what}; please report it")
