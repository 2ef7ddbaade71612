"""Notices that a training has diverged, and says where: the first bad step, its micro-batches, its layers.

A step is bad if its loss or a gradient is not finite, if its loss is many times its moving average, or if the trust
ratios have collapsed. What tells is added up over the ranks, so all of them decide alike. It is read one step later,
which costs no synchronisation; only to leave out a bad step it has to be read before the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lbzoo.callbacks.layer_stats import over_shards
from lbzoo.callbacks.log_values import log_scalars
from lbzoo.callbacks.optimizer_view import Layer, parameters, trained_layers, unwrap
from lbzoo.callbacks.rank_sum import RankSum
from lbzoo.callbacks.trainer_view import TrainerView, at_least_one, coming_step, is_logged
from lbzoo.errors import DivergedError, UsageError
from lbzoo.ranks import has_other_ranks, is_first_rank
from lbzoo.sharding import local, local_gradient

_SETTLING = 20  # steps before a loss can be a spike
_WORST = 10  # layers in a report


@dataclass
class MovingAverage:
    """An exponential one, over about the last 1 / (1 - decay) values; until there are so many, their mean."""

    decay: float
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(1 - self.decay, 1 / self.count)


@dataclass(frozen=True)
class LayerFinding:
    """A layer at a bad step: the norms of its gradient (before clipping) and of its weights, and its trust ratio.

    The trust ratio is the last that was looked at and finite; None where the optimizer has none.
    """

    name: str
    grad_norm: float
    param_norm: float
    trust_ratio: float | None


@dataclass(frozen=True)
class Finding:
    """A bad step. ``losses`` are of its micro-batches, by rank; ``layers`` the worst first."""

    step: int
    reason: str
    loss: float
    average_loss: float
    losses: list[list[float]]
    layers: list[LayerFinding]

    def worst_micro_batches(self) -> list[tuple[int, int]]:
        """(rank, number in the rank's step) of those whose loss is not finite, else of the one with the largest."""
        places = [(r, m) for r, row in enumerate(self.losses) for m in range(len(row))]
        bad = [(r, m) for r, m in places if not math.isfinite(self.losses[r][m])]
        return bad or sorted(places, key=lambda place: -self.losses[place[0]][place[1]])[:1]

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=0)
        lines = [
            f"step {self.step}: {self.reason}",
            f"loss {self.loss:.6g}, its moving average before {self.average_loss:.6g}",
            "layer".ljust(width) + "   |gradient|    |weights|  trust ratio",
        ]
        for layer in self.layers:
            ratio = "" if layer.trust_ratio is None else f"{layer.trust_ratio:13.4g}"
            lines.append(f"{layer.name:<{width}}{layer.grad_norm:13.4g}{layer.param_norm:13.4g}{ratio}")
        return "\n  ".join(lines)


@dataclass(frozen=True)
class _Step:
    """An optimizer step that is not judged yet."""

    number: int
    losses: Tensor  # of this rank's micro-batches; their sum is the rank's loss
    layers: list[Layer]  # that have a gradient
    grad_norms: Tensor  # [layers], of what this rank holds
    sums: RankSum  # of: loss, ranks that have one, layers whose gradient is not finite, ranks that saw a collapse


class Divergence(Callback):
    """Ends a training that has diverged with a DivergedError, or leaves out its bad steps.

    Args:
        policy: ``stop`` raises at the first bad step; ``skip`` leaves it out, weights and optimizer untouched, and
            goes on, unless ``at_most`` steps one after the other were left out already.
        at_most: see there.
        loss_spike: a loss is bad above so many times its moving average, which is over about 50 steps, if it is also
            higher than that average has ever been: near zero single batches jump far without harm. None for never.
        trust_ratio_drop: trust ratios have collapsed when their geometric mean over the layers is below this share of
            its moving average; None for never. Only for optimizers that publish them (``layer_stats``).
        every: optimizer steps between looks at the trust ratios.
        on_bad_step: called on the first rank with each bad step; what it returns ends the error's message.
    """

    def __init__(
        self,
        *,
        policy: Literal["stop", "skip"] = "stop",
        at_most: int = 3,
        loss_spike: float | None = 10.0,
        trust_ratio_drop: float | None = 1e-3,
        every: int = 50,
        on_bad_step: Callable[[Finding], str] = lambda finding: "",
    ) -> None:
        self.policy, self.at_most, self.every = policy, at_most, at_least_one(every)
        self.loss_spike, self.trust_ratio_drop = loss_spike, trust_ratio_drop
        self._on_bad_step = on_bad_step
        self._loss = MovingAverage(0.98)
        self._highest_loss = 0.0  # that the moving average has been since it settled
        self._log_ratio = MovingAverage(0.9)
        self.skipped = self._skipped_in_a_row = 0
        self._begin([])

    def _begin(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._losses: list[Tensor] = []
        self._unread: _Step | None = None
        self._seen = 0  # the last step whose gradients were looked at
        self._tracked: list[Optimizer] = []  # whose coming step is looked at
        self._trust_ratios: dict[str, float] = {}
        self._collapse = False
        self._buffers: list[tuple[Tensor, Tensor]] = []  # of the module, with copies from before the step
        self._log_skip = False

    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self.policy == "skip" and _scaler(trainer) is not None:
            raise UsageError("divergence: under 16-mixed the loss scaler leaves out steps whose gradients are not "
                             "finite by itself; take the policy stop")  # fmt: skip
        self._begin(trained_layers([unwrap(optimizer) for optimizer in trainer.optimizers], pl_module))

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.policy == "skip" and batch_idx % trainer.accumulate_grad_batches == 0:
            self._keep_buffers(pl_module)

    def on_before_backward(self, trainer: TrainerView, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = coming_step(trainer)
        if step == self._seen:
            return
        self._seen = step
        self.settle()
        self._unread = self._look_at(step, trainer)
        if self.policy == "skip" and (finding := self._judge()) is not None:
            self._leave_out(finding, trainer)
        elif self.trust_ratio_drop is not None and is_logged(step, self.every):
            self._tracked = [bare for o in trainer.optimizers if hasattr(bare := unwrap(o), "layer_stats")]
            for bare in self._tracked:
                bare.track_layer_stats = True  # type: ignore[attr-defined]  # of lbzoo's optimizers

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tracked:
            self._look_at_trust_ratios()
        if self._log_skip:
            self._log_skip = False
            log_scalars(trainer, {"summary/skipped_steps": self.skipped}, trainer.global_step)

    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        self.settle()

    def settle(self) -> None:
        """Judge the step that was not read yet; on every rank. Raises DivergedError if it is bad."""
        if (finding := self._judge()) is not None:
            raise self._error("diverged at", finding)

    def check_weights(self, step: int) -> None:
        """Before something keeps the weights; on every rank. Waits for the device. Raises DivergedError if bad."""
        self.settle()
        weights = [layer.parameter for layer in self._layers]
        norms = _norms([local(weight) for weight in weights])
        (bad,) = RankSum((~norms.isfinite()).sum().double().reshape(1)).read()
        if bad:
            nothing = torch.zeros_like(norms)
            finding = self._finding(step, "weights are not finite", math.nan, self._layers, nothing, [])
            raise self._error("diverged at", finding)

    def state_dict(self) -> dict[str, Any]:
        averages = {"loss": self._loss, "log_trust_ratio": self._log_ratio}
        values = {name: [average.value, average.count] for name, average in averages.items()}
        skipped = {"skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        return {**values, "highest_loss": self._highest_loss, **skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loss.value, self._loss.count = state_dict["loss"]
        self._highest_loss = state_dict.get("highest_loss", 0.0)  # checkpoints were without it for a while
        self._log_ratio.value, self._log_ratio.count = state_dict["log_trust_ratio"]
        self.skipped, self._skipped_in_a_row = state_dict["skipped"], state_dict["skipped_in_a_row"]

    def _look_at(self, step: int, trainer: TrainerView) -> _Step:
        """Begin to add up what tells, on the device."""
        layers = [layer for layer in self._layers if layer.parameter.grad is not None]
        device = trainer.lightning_module.device
        norms = _norms([local_gradient(layer.parameter) for layer in layers]).to(device)
        own, self._losses = self._losses, []
        losses = torch.stack(own).double() if own else torch.zeros(0, dtype=torch.float64, device=device)
        bad = (~norms.isfinite()).sum().double()
        if (scaler := _scaler(trainer)) is not None:
            losses = losses / scaler.scale(torch.ones((), device=device)).double()
            bad.zero_()  # it leaves out steps whose gradients are not finite, and finds its scale that way
        marks = torch.tensor([float(bool(own)), float(self._collapse)], dtype=torch.float64).to(device)
        self._collapse = False
        return _Step(step, losses, layers, norms, RankSum(torch.stack([losses.sum(), bad, *marks])))

    def _judge(self) -> Finding | None:
        """Read the step that was not read yet: what is bad about it, or None."""
        step, self._unread = self._unread, None
        if step is None:
            return None
        total, bad_layers, ranks, collapses = step.sums.read()
        loss = total / ranks if ranks else None
        reason = self._reason(loss, bool(bad_layers), bool(collapses))
        if reason is None:
            self._skipped_in_a_row = 0
            if loss is not None:
                self._add_to_average(loss)
            return None
        of_run = math.nan if loss is None else loss
        return self._finding(step.number, reason, of_run, step.layers, step.grad_norms, step.losses.tolist())

    def _add_to_average(self, loss: float) -> None:
        self._loss.add(loss)
        if self._loss.count >= _SETTLING:
            self._highest_loss = max(self._highest_loss, self._loss.value)

    def _is_spike(self, loss: float) -> bool:
        if self.loss_spike is None or self._loss.count < _SETTLING:
            return False
        return 0 < self.loss_spike * self._loss.value < loss and self._highest_loss < loss

    def _reason(self, loss: float | None, gradients_are_bad: bool, has_collapsed: bool) -> str | None:
        if loss is not None and not math.isfinite(loss):
            return "the loss is not finite"
        if gradients_are_bad:
            return "gradients are not finite"
        if loss is not None and self._is_spike(loss):
            times = f"the loss is more than {self.loss_spike:g} times its moving average"
            return f"{times}, which has never been above {self._highest_loss:.4g}"
        return "the trust ratios have collapsed" if has_collapsed else None

    def _finding(
        self, step: int, reason: str, loss: float, layers: Sequence[Layer], grad_norms: Tensor, losses: list[float]
    ) -> Finding:
        """Collective: norms are over all shards, losses of all ranks."""
        tensors = [layer.parameter for layer in layers]
        squares = torch.stack([grad_norms.double(), _norms([local(tensor) for tensor in tensors]).double()]).square()
        grads, params = over_shards(tensors, squares).sqrt().tolist()
        findings = [
            LayerFinding(layer.name, grad, param, self._trust_ratios.get(layer.name))
            for layer, grad, param in zip(layers, grads, params, strict=True)
        ]
        findings.sort(key=_badness, reverse=True)
        return Finding(step, reason, loss, self._loss.value, _of_all_ranks(losses), findings[:_WORST])

    def _report(self, finding: Finding) -> str:
        return self._on_bad_step(finding) if is_first_rank() else ""

    def _error(self, what: str, finding: Finding) -> DivergedError:
        return DivergedError(f"{what} {finding}\n  {self._report(finding)}".rstrip(), step=finding.step)

    def _leave_out(self, finding: Finding, trainer: TrainerView) -> None:
        """Without gradients the optimizer's step does nothing; the forward passes have changed only buffers."""
        if self._skipped_in_a_row >= self.at_most:
            raise self._error(f"diverged, after {self.at_most} steps in a row that were left out, at", finding)
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._report(finding)
        self._log_skip = True
        for optimizer in trainer.optimizers:
            for parameter in parameters(unwrap(optimizer)):
                parameter.grad = None
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)

    @torch.no_grad()
    def _keep_buffers(self, module: nn.Module) -> None:
        if not self._buffers:
            self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
            return
        for buffer, before in self._buffers:
            before.copy_(buffer)

    def _look_at_trust_ratios(self) -> None:
        found: dict[str, float] = {}
        for optimizer in self._tracked:
            optimizer.track_layer_stats = False  # type: ignore[attr-defined]
            stats = optimizer.layer_stats()  # type: ignore[attr-defined]
            ratios = stats.values.get("trust_ratio")
            if ratios is not None:
                name_of = {layer.reported_as: layer.name for layer in self._layers if layer.optimizer is optimizer}
                names = [name_of.get(name, name) for name in stats.names]
                found |= {n: r for n, r in zip(names, ratios.tolist(), strict=True) if 0 < r < math.inf}
        self._tracked = []
        self._trust_ratios |= found
        logs = [math.log(ratio) for ratio in found.values()]
        if not logs:
            return
        mean = sum(logs) / len(logs)
        assert self.trust_ratio_drop is not None
        self._collapse = self._log_ratio.count > 0 and mean < self._log_ratio.value + math.log(self.trust_ratio_drop)
        if not self._collapse:
            self._log_ratio.add(mean)


@torch.no_grad()
def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """2-norms [tensors] of what this rank holds, in the tensors' type or float32."""
    if not tensors:
        return torch.zeros(0)
    dense = [tensor._values() if tensor.is_sparse else tensor for tensor in tensors]
    norms = torch._foreach_norm(dense, 2.0, dtype=torch.promote_types(dense[0].dtype, torch.float32))
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _of_all_ranks(losses: list[float]) -> list[list[float]]:
    """By rank. Collective."""
    if not has_other_ranks():
        return [losses]
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, losses)
    return by_rank


def _badness(layer: LayerFinding) -> tuple[bool, float]:
    """Layers that are not finite, then those whose gradient is largest for their weights."""
    if not (math.isfinite(layer.grad_norm) and math.isfinite(layer.param_norm)):
        return True, 0.0
    return False, layer.grad_norm / layer.param_norm if layer.param_norm else 0.0


def _scaler(trainer: TrainerView) -> Any:
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
