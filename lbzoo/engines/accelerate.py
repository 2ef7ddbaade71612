"""The accelerate engine: each stage of a recipe is a loop of lbzoo's own on an ``accelerate.Accelerator``.

accelerate finds the devices, wraps the model and casts to the run's precision; the loop (``loop.py``) calls the same
hooks of the same LightningModule and callbacks as a Trainer does. FSDP2 is lbzoo's own for both engines
(``sharded_model.py``): accelerate's plugin becomes DDP without a word where it finds no GPU. So whatever came out, the
number of processes, the device, the precision and the strategy, is checked against the recipe before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lbzoo.engines.hooks import Hooks
from lbzoo.engines.launch import World
from lbzoo.engines.loop import Loop
from lbzoo.engines.loop_trainer import LoopTrainer
from lbzoo.engines.sharded_model import shard, without_reduction
from lbzoo.engines.stage_run import StageRun
from lbzoo.engines.trainer_setup import quiet_lightning
from lbzoo.errors import LbzooError, UsageError
from lbzoo.recipe import ResolvedRecipe
from lbzoo.tasks.base import Task

if TYPE_CHECKING:
    from lbzoo.recipe.schema import TrainerSettings

_MIXED = {"bf16-mixed": "bf16", "16-mixed": "fp16"}


def train_stage(stage_run: StageRun, module: Task) -> int:
    _refuse_manual_optimization(module)
    recipe, world = stage_run.recipe, stage_run.world
    with quiet_lightning(), _accelerator(recipe.trainer, world) as accelerator:
        machine = AccelerateMachine(accelerator, module, world, recipe.trainer)
        trainer = LoopTrainer(
            module,
            world,
            accelerator.device,
            loggers=stage_run.loggers(),
            callbacks=stage_run.callbacks,
            step=stage_run.step,
            first_step=stage_run.stage.first_step,
            max_steps=stage_run.last_step,
            accumulate_grad_batches=stage_run.accumulate,
            gradient_clip_norm=recipe.trainer.gradient_clip_norm,
            log_every=recipe.logging.every,
            default_root_dir=str(stage_run.run.path),
        )
        with _attached(trainer, module) as hooks:
            loop = Loop(
                trainer,
                machine,
                hooks,
                validate_every=stage_run.validate_every,
                closure_not_run=stage_run.closure_not_run,
            )
            _set_up(trainer, machine, hooks)
            trainer.train_dataloader, trainer.val_dataloaders = stage_run.train_loader(), stage_run.val_loader()
            trainer.num_training_batches = len(trainer.train_dataloader)
            trainer.num_val_batches = [len(trainer.val_dataloaders)]
            hooks.call("on_fit_start")
            loop.train(validation_owed=stage_run.validation_owed)
            hooks.call("on_fit_end")
            hooks.call("teardown", stage="fit")
    return trainer.global_step


def evaluate(recipe: ResolvedRecipe, world: World, module: Task, loader: Any) -> Mapping[str, float]:
    with quiet_lightning(), _accelerator(recipe.trainer, world) as accelerator:
        machine = AccelerateMachine(accelerator, module, world, recipe.trainer)
        trainer = LoopTrainer(module, world, accelerator.device)
        with _attached(trainer, module) as hooks, torch.inference_mode():
            hooks.call("setup", stage="validate")
            hooks.of_module("configure_model")
            machine.place()
            trainer.val_dataloaders, trainer.num_val_batches = loader, [len(loader)]
            values = Loop(trainer, machine, hooks).validate()
            hooks.call("teardown", stage="validate")
    return {name: float(value) for name, value in values.items()}


class AccelerateMachine:
    """A module as accelerate has prepared it; see ``loop.Machine``."""

    def __init__(self, accelerator: Accelerator, module: Task, world: World, settings: TrainerSettings) -> None:
        self.device: torch.device = accelerator.device
        self.model: nn.Module = module
        self.scaler = accelerator.scaler
        self._accelerator, self._module = accelerator, module
        self._world, self._settings = world, settings
        self._precision = _true_precision(settings.precision)
        self._is_sharded = settings.strategy == "fsdp"
        self._optimizer: Any = None  # as prepared

    def place(self) -> None:
        """Shard the module, or convert its weights, and move it to the device."""
        if self._is_sharded:
            shard(self._module, self._world, self._settings)
        self._precision.convert_module(self._module)
        self._module.to(self.device)

    def prepare(self, optimizer: Optimizer) -> None:
        """Wrap module and optimizer, in one call, and check what came out."""
        accelerator, module = self._accelerator, self._module
        forward = module.__dict__.get("forward")
        if self._is_sharded:
            self.model = accelerator.prepare_model(module, evaluation_mode=True)  # it is what it shall be
            self._optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        else:
            self.model, self._optimizer = accelerator.prepare(module, optimizer, device_placement=[False, False])
        # accelerate casts in forward, and what it returns; here a whole training_step is under autocast, as it is.
        module.__dict__.pop("forward", None)
        if forward is not None:
            module.__dict__["forward"] = forward
        is_ddp = isinstance(self.model, DistributedDataParallel)
        if is_ddp != (self._world.world_size > 1 and not self._is_sharded):
            raise LbzooError(
                f"trainer.strategy={self._settings.strategy} on {self._world.world_size} devices has become "
                f"{'DDP' if is_ddp else 'a bare model'} in accelerate; please report it"
            )

    def convert(self, batch: Any) -> Any:
        return self._precision.convert_input(batch)

    def training_step(self, *args: Any) -> Any:
        with self._context():
            if self.model is self._module:
                return self._module.training_step(*args)
            with self._training_step_as_forward():  # DDP looks at what goes in and out of forward
                return self.model(*args)

    def validation_step(self, *args: Any) -> Any:
        with self._context():
            return self._module.validation_step(*args)

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def accumulating(self) -> AbstractContextManager[None]:
        return without_reduction(self._module) if self._is_sharded else self._accelerator.no_sync(self.model)

    def step(self, closure: Any, with_gradients: Any) -> None:
        if self.scaler is None:

            def closure_and_hooks() -> Tensor | None:
                loss: Tensor | None = closure()
                with_gradients()
                return loss

            # Not the wrapper's step, which in every call looks through the file system for a package.
            self._optimizer.optimizer.step(closure_and_hooks)
            return
        loss, bare = closure(), self._optimizer.optimizer
        # torch's fused optimizers unscale in their step.
        if loss is not None and not getattr(bare, "_step_supports_amp_scaling", False):
            self.scaler.unscale_(bare)
        with_gradients()
        if loss is not None:
            self._optimizer.step()  # the scaler leaves it out where a gradient has overflown

    @contextmanager
    def _context(self) -> Iterator[None]:
        with self._precision.forward_context(), self._accelerator.autocast():
            yield

    @contextmanager
    def _training_step_as_forward(self) -> Iterator[None]:
        attributes = self._module.__dict__
        own = attributes.get("forward")

        def restore() -> None:
            attributes.pop("forward", None)
            if own is not None:
                attributes["forward"] = own

        def forward(*args: Any) -> Any:
            restore()  # the step itself may call forward
            return self._module.training_step(*args)

        attributes["forward"] = forward
        try:
            yield
        finally:
            restore()


def _set_up(trainer: LoopTrainer, machine: AccelerateMachine, hooks: Hooks) -> None:
    """Place the module, build its optimizer, and prepare both."""
    hooks.call("setup", stage="fit")
    hooks.of_module("configure_model")
    machine.place()
    optimizer, schedules = _configured(hooks.of_module("configure_optimizers"))
    machine.prepare(optimizer)
    trainer.model = machine.model
    trainer.optimizers, trainer.lr_scheduler_configs = [optimizer], schedules
    trainer.precision_plugin.scaler = machine.scaler
    trainer.strategy.attach(optimizer)


@contextmanager
def _attached(trainer: LoopTrainer, module: Task) -> Iterator[Hooks]:
    """Module and callbacks see ``trainer``; what is raised reaches the callbacks' ``on_exception``."""
    hooks = Hooks(trainer, module, trainer.callbacks)
    module.trainer = trainer  # type: ignore[assignment]  # of the Trainer it has what a module may use
    for callback in trainer.callbacks:
        callback.log, callback.log_dict = module.log, module.log_dict  # type: ignore[attr-defined]  # as a Trainer does
    try:
        yield hooks
    except BaseException as error:
        hooks.of_callbacks("on_exception", error)
        for logger in trainer.loggers:
            logger.finalize("failed")
        raise
    else:
        for logger in trainer.loggers:
            logger.finalize("success")
    finally:
        module._current_fx_name = None


def _configured(configuration: Any) -> tuple[Optimizer, list[LRSchedulerConfig]]:
    """What ``configure_optimizers`` returned, as Lightning reads it."""
    optimizers, schedulers, monitor = _configure_optimizers(configuration)
    if len(optimizers) != 1:
        raise UsageError(f"configure_optimizers gave {len(optimizers)} optimizers; lbzoo's engines train with one")
    configs = _configure_schedulers_automatic_opt(schedulers, monitor)
    for config in configs:
        if config.reduce_on_plateau or config.interval != "step":
            raise UsageError(
                f"{type(config.scheduler).__name__} (interval: {config.interval}): with trainer.engine=accelerate a "
                "schedule goes by optimizer steps, 'interval': 'step', and by no metric"
            )
    return optimizers[0], configs


def _refuse_manual_optimization(module: Task) -> None:
    if not module.automatic_optimization:
        raise UsageError(
            f"{type(module).__name__} has automatic_optimization = False: manual optimization is not in the accelerate "
            "engine; use trainer.engine=lightning, or let training_step return the loss"
        )


def _true_precision(precision: str) -> Precision:
    """What Lightning does for weights that are not float32; autocast and loss scaling are accelerate's."""
    if precision == "64-true":
        return DoublePrecision()
    return HalfPrecision("bf16-true") if precision == "bf16-true" else Precision()


@contextmanager
def _accelerator(settings: TrainerSettings, world: World) -> Iterator[Accelerator]:
    """An Accelerator for the world and the recipe, with which ``accelerate launch`` was compared before."""
    mixed = _MIXED.get(settings.precision, "no")
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # running statistics are averaged when they are needed, not rank 0's taken
    )
    if AcceleratorState._shared_state:
        raise UsageError("this process has an Accelerator already; with trainer.engine=accelerate lbzoo makes its own")
    with _variables(world):
        accelerator = Accelerator(
            cpu=world.accelerator == "cpu",
            mixed_precision=mixed,
            gradient_accumulation_steps=1,  # the loop accumulates
            step_scheduler_with_optimizer=False,  # and steps the schedule once a step
            kwargs_handlers=[ddp],
        )
    try:
        found = (accelerator.num_processes, accelerator.process_index, accelerator.device.type)
        if found != (world.world_size, world.rank, world.accelerator) or accelerator.mixed_precision != mixed:
            raise LbzooError(
                f"accelerate is process {found[1]} of {found[0]} on {found[2]} with mixed_precision "
                f"{accelerator.mixed_precision}; the recipe and the launcher say {world.rank} of {world.world_size} on "
                f"{world.accelerator} with {mixed}"
            )
        yield accelerator
    finally:
        accelerator.free_memory()
        # Its state is of the process: the next run may have another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# What accelerate would obey beside its arguments; all of it has been compared with the recipe (accelerate_config.py).
_OBEYED = ("ACCELERATE_USE_", "ACCELERATE_DYNAMO_", "ACCELERATE_TORCH_DEVICE")
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def _variables(world: World) -> Iterator[None]:
    """The environment in which accelerate finds the world, and takes its arguments for the whole truth."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_OBEYED) or name in _WORLD:
            del os.environ[name]
    if world.world_size > 1:
        of_rank = (world.rank, world.world_size, world.local_rank, world.devices)
        os.environ.update({name: str(value) for name, value in zip(_WORLD, of_rank, strict=True)})
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or accelerate chooses another number
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
