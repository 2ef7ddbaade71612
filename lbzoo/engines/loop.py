"""A training loop of lbzoo's own, which drives an unmodified LightningModule and Lightning's callbacks.

What is called, and when, is as in Lightning's Trainer (docs/engines.md has the list); an epoch is a whole stage. How a
step is computed, on which devices and in which precision, is behind :class:`Machine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lbzoo.engines.hooks import Hooks
from lbzoo.engines.loop_trainer import LoopTrainer
from lbzoo.errors import LbzooError


class Machine(Protocol):
    """The devices, as the loop sees them."""

    @property
    def device(self) -> torch.device: ...

    def convert(self, batch: Any) -> Any:
        """The batch in the precision of the weights."""

    def training_step(self, *args: Any) -> Any:
        """The module's, in the run's precision, and through the wrapper that sees to the gradients of other ranks."""

    def validation_step(self, *args: Any) -> Any: ...

    def scale(self, loss: Tensor) -> Tensor:
        """The loss as it goes into the backward pass."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass of each micro-batch of a step but the last."""

    def step(self, closure: Callable[[], Tensor | None], with_gradients: Callable[[], None]) -> None:
        """Run the closure, then ``with_gradients`` once they are unscaled, then the optimizer's step."""


class Loop:
    """Trains and validates one stage.

    Args:
        trainer: with optimizer, schedules, loggers and loaders in place; its counters are this loop's.
        machine: where the steps are computed.
        hooks: of the callbacks and the module.
        validate_every: optimizer steps between validations.
        closure_not_run: the error for an optimizer that does not call its closure.
    """

    def __init__(
        self,
        trainer: LoopTrainer,
        machine: Machine,
        hooks: Hooks,
        *,
        validate_every: int = 0,
        closure_not_run: Callable[[], LbzooError] = lambda: LbzooError("the optimizer did not run its closure"),
    ) -> None:
        self._trainer, self._machine, self._hooks = trainer, machine, hooks
        self._module, self._logged = trainer.lightning_module, trainer._logger_connector
        self._validate_every, self._closure_not_run = validate_every, closure_not_run
        self._training_step_takes_index = _takes_batch_idx(self._module.training_step)
        self._validation_step_takes_index = _takes_batch_idx(self._module.validation_step)
        self._outputs: dict[str, Any] | None = None  # of the running micro-batch, once its closure has run
        trainer.strategy.step = self._step

    def train(self, *, validation_owed: bool) -> None:
        """From ``on_train_start`` to ``on_train_end``."""
        trainer, hooks = self._trainer, self._hooks
        self._module.zero_grad()
        hooks.call("on_train_start")
        if validation_owed:
            self._validate_within_training()
        hooks.call("on_train_epoch_start")
        for batch_idx, batch in enumerate(trainer.train_dataloader):
            self._train_batch(batch, batch_idx)
            if trainer.should_stop and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                break
        values = self._logged.end_epoch(lambda: hooks.call("on_train_epoch_end"))
        self._logged.log_epoch(values, trainer.global_step)
        self._logged.reset()
        trainer.current_epoch += 1
        hooks.call("on_train_end")

    def validate(self) -> dict[str, Tensor]:
        """From ``on_validation_start`` to ``on_validation_end``, in the module's evaluation mode, without gradients."""
        trainer, hooks, logged, module = self._trainer, self._hooks, self._logged, self._module
        stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
        interrupted = logged.begin_validation()
        modes = {submodule: submodule.training for submodule in module.modules()}
        hooks.of_module("on_validation_model_eval")
        hooks.call("on_validation_start")
        hooks.call("on_validation_epoch_start")
        for batch_idx, batch in enumerate(trainer.val_dataloaders):
            self._validate_batch(batch, batch_idx)
        values = logged.end_epoch(lambda: hooks.call("on_validation_epoch_end"))
        logged.log_epoch(values, trainer.global_step)
        hooks.call("on_validation_end")
        logged.end_validation(interrupted)
        self._restore_modes(modes)
        trainer.state.stage = stage
        return values

    def _train_batch(self, batch: Any, batch_idx: int) -> None:
        trainer, hooks = self._trainer, self._hooks
        batch = self._to_device(batch)
        self._logged.begin_batch(batch)
        if hooks.call("on_train_batch_start", batch, batch_idx) == -1:
            raise LbzooError(
                "on_train_batch_start returned -1 to end the epoch; with trainer.engine=accelerate a module ends the "
                "training by self.trainer.should_stop = True"
            )
        self._outputs = None
        closure = self._closure(batch, batch_idx)
        steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if steps:
            self._optimizer_step(closure, batch_idx)
            self._step_schedules(batch_idx)
        else:
            with self._machine.accumulating():
                closure()
        hooks.call("on_train_batch_end", self._outputs, batch, batch_idx)
        self._logged.end_batch()
        if steps:
            self._end_step()

    def _end_step(self) -> None:
        trainer = self._trainer
        self._logged.log_step(trainer.global_step, is_last=trainer.should_stop)
        if trainer.should_stop or trainer.global_step % self._validate_every == 0:
            self._validate_within_training()
        if trainer.should_stop:
            for logger in trainer.loggers:
                logger.save()

    def _closure(self, batch: Any, batch_idx: int) -> Callable[[], Tensor | None]:
        """Forward pass, ``zero_grad`` in a step's first micro-batch, backward pass; returns the loss."""
        trainer, hooks, machine = self._trainer, self._hooks, self._machine
        args = (batch, batch_idx) if self._training_step_takes_index else (batch,)

        @torch.enable_grad()
        def closure() -> Tensor | None:
            self._module._current_fx_name = "training_step"
            output = machine.training_step(*args)
            self._module._current_fx_name = None
            loss, extra = _split(output, trainer.world_size)
            if batch_idx % trainer.accumulate_grad_batches == 0:
                (optimizer,) = trainer.optimizers
                hooks.call("on_before_zero_grad", optimizer)
                hooks.of_module("optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer)
            self._outputs = extra
            if loss is None:
                return None
            loss = loss / trainer.accumulate_grad_batches
            result = loss.detach()
            self._outputs = {"loss": result, **extra}
            scaled = machine.scale(loss)
            hooks.call("on_before_backward", scaled)
            hooks.of_module("backward", scaled)
            hooks.call("on_after_backward")
            return result

        return closure

    def _optimizer_step(self, closure: Callable[[], Tensor | None], batch_idx: int) -> None:
        """Through the module's ``optimizer_step``, which steps the optimizer that it is given: :meth:`_step`."""
        trainer = self._trainer
        (wrapped,) = trainer.strategy._lightning_optimizers
        self._hooks.of_module("optimizer_step", trainer.current_epoch, batch_idx, wrapped, closure)
        if self._outputs is None:
            raise self._closure_not_run()
        trainer.global_step += 1

    def _step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        trainer, hooks = self._trainer, self._hooks

        def with_gradients() -> None:
            hooks.call("on_before_optimizer_step", optimizer)
            hooks.of_module(
                "configure_gradient_clipping",
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )

        self._machine.step(closure, with_gradients)

    def _step_schedules(self, batch_idx: int) -> None:
        for config in self._trainer.lr_scheduler_configs:
            if (batch_idx + 1) % config.frequency == 0:
                self._hooks.of_module("lr_scheduler_step", config.scheduler, None)

    def _validate_within_training(self) -> None:
        self._hooks.of_module("on_validation_model_zero_grad")
        with torch.no_grad():
            self.validate()

    def _validate_batch(self, batch: Any, batch_idx: int) -> None:
        hooks, logged = self._hooks, self._logged
        batch = self._to_device(batch)
        logged.begin_batch(batch)
        hooks.call("on_validation_batch_start", batch, batch_idx)
        self._module._current_fx_name = "validation_step"
        args = (batch, batch_idx) if self._validation_step_takes_index else (batch,)
        output = self._machine.validation_step(*args)
        self._module._current_fx_name = None
        hooks.call("on_validation_batch_end", output, batch, batch_idx)
        logged.end_batch()
        logged.log_validation_batch(batch_idx)

    def _to_device(self, batch: Any) -> Any:
        batch = self._machine.convert(batch)
        batch = self._hooks.of_module("on_before_batch_transfer", batch, 0)
        batch = self._hooks.of_module("transfer_batch_to_device", batch, self._machine.device, 0)
        return self._hooks.of_module("on_after_batch_transfer", batch, 0)

    def _restore_modes(self, modes: Mapping[torch.nn.Module, bool]) -> None:
        if type(self._module).on_validation_model_train is not pl.LightningModule.on_validation_model_train:
            self._hooks.of_module("on_validation_model_train")
            return
        for submodule, training in modes.items():
            submodule.training = training


def _split(output: Any, world_size: int) -> tuple[Tensor | None, dict[str, Any]]:
    """A training step's loss, and what it returned beside it."""
    if output is None:
        if world_size > 1:
            raise LbzooError("training_step returned None on one of several devices: the others would wait for it")
        return None, {}
    if isinstance(output, Tensor):
        return output, {}
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"], {name: value for name, value in output.items() if name != "loss"}
    raise LbzooError(
        f"training_step must return the loss, a dictionary with the key 'loss', or None, not a {type(output).__name__}"
    )


def _takes_batch_idx(step: Callable[..., Any]) -> bool:
    return is_param_in_hook_signature(step, "batch_idx", min_args=2)
