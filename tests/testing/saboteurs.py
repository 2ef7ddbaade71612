"""Optimizers with one fault each, and the honest one that they are made of.

:class:`Honest` passes every check of the kit. Each saboteur changes it in one place. ``CAUGHT_BY`` holds the
checks that must fail for it, all others must pass: the fault's own check first, then those that cannot help noticing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lbzoo.optim import LayerStats

CAUGHT_BY: dict[str, tuple[str, ...]] = {}  # saboteur: names of the checks that fail
SABOTEURS: dict[str, Callable[..., torch.optim.Optimizer]] = {}


def caught_by(*checks: str) -> Callable[[Any], Any]:
    """Enlist a saboteur, with the checks that it must fail."""

    def enlist(saboteur: Any) -> Any:
        CAUGHT_BY[saboteur.__name__] = checks
        SABOTEURS[saboteur.__name__] = saboteur
        return saboteur

    return enlist


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Honest(torch.optim.Optimizer):
    """Momentum on softly normalised gradients: m = mu m + g/(1 + |g|), x -= lr (m + d x), |g| the norm of the layer.

    State and arithmetic are float32, norms are those of whole layers with one collective a group, p.grad is only read.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves grad_scale and found_inf to the optimizer
    track_layer_stats = False

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        nesterov: bool = False,
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise ValueError(f"out of range: lr={lr}, momentum={momentum}, weight_decay={weight_decay}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)
        self.stats = LayerStats()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for key in param_group.keys() - self.defaults.keys() - {"params", "param_names", "lr_scale", "name"}:
            raise ValueError(f"no option '{key}'")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if not self.overflowed():
                self.update()
        return loss

    def overflowed(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def update(self) -> None:
        names: list[str] = []
        values: list[Tensor] = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                all_names = group.get("param_names", [str(index) for index in range(len(group["params"]))])
                names += [n for n, p in zip(all_names, group["params"], strict=True) if p.grad is not None]
                values.append(self.update_group(group, parameters))
        if self.track_layer_stats:
            self.stats = self.statistics(names, *torch.cat(values, dim=1))

    def update_group(self, group: dict[str, Any], parameters: list[Tensor]) -> Tensor:
        """Step these parameters; returns |x| before, |g| and |step|, shape [3, layers], where they are asked for."""
        gradients = self.gradients(parameters)
        norms = self.norms(parameters, gradients)
        before = [local(parameter).float().clone() for parameter in parameters]
        directions = self.directions(parameters, gradients, norms)
        for parameter, direction in zip(parameters, directions, strict=True):
            self.move(group, parameter, direction)
        if not self.track_layer_stats:
            return norms
        steps = [local(parameter).float() - x for parameter, x in zip(parameters, before, strict=True)]
        return torch.stack([self.norms(parameters, before), norms, self.norms(parameters, steps)])

    def gradients(self, parameters: list[Tensor]) -> list[Tensor]:
        """Local gradients in float32, loss scaling taken out."""
        self.refuse_sparse(parameters)
        scale = getattr(self, "grad_scale", None)
        gradients = [local(parameter.grad).float() for parameter in parameters]
        return gradients if scale is None else [gradient / scale for gradient in gradients]

    def refuse_sparse(self, parameters: list[Tensor]) -> None:
        if any(parameter.grad.is_sparse for parameter in parameters):
            raise RuntimeError("Honest takes no sparse gradients")

    def norms(self, parameters: list[Tensor], tensors: list[Tensor]) -> Tensor:
        squares = torch.stack([tensor.square().sum() for tensor in tensors])
        sharded = torch.tensor([isinstance(parameter, DTensor) for parameter in parameters])
        return torch.where(sharded, self.over_ranks(squares), squares).sqrt() if sharded.any() else squares.sqrt()

    def over_ranks(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def directions(self, parameters: list[Tensor], gradients: list[Tensor], norms: Tensor) -> list[Tensor]:
        return [gradient / (1 + norm) for gradient, norm in zip(gradients, norms, strict=True)]

    def move(self, group: dict[str, Any], parameter: Tensor, direction: Tensor) -> None:
        buffer = local(self.state_of(parameter)["buffer"])
        buffer.mul_(group["momentum"]).add_(direction)
        chosen = direction + group["momentum"] * buffer if group["nesterov"] else buffer
        weight = local(parameter)
        decay = self.weight_decay(group) * weight.float()
        weight.copy_(weight.float() - self.lr(group) * (chosen + decay))

    def lr(self, group: dict[str, Any]) -> Any:
        return group["lr"]

    def weight_decay(self, group: dict[str, Any]) -> float:
        return group["weight_decay"]

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def statistics(self, names: list[str], sizes: Tensor, norms: Tensor, steps: Tensor) -> LayerStats:
        return LayerStats(names, {"param_norm": sizes, "grad_norm": norms, "update_ratio": steps / sizes})

    def layer_stats(self) -> LayerStats:
        return self.stats

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts state to its parameter's type: the float32 tensors are put back."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.clone()


# One step


@caught_by("step_without_closure")
class ReturnsItself(Honest):
    def step(self, closure=None):
        loss = super().step(closure)
        return self if closure is None else loss


@caught_by("closure")
class IgnoresClosure(Honest):
    def step(self, closure=None):
        return super().step(None)


@caught_by("closure")
class RunsClosureWithoutGradients(Honest):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step(None)
        return loss


@caught_by("closure")
class RunsClosureLast(Honest):
    def step(self, closure=None):
        super().step(None)
        return closure() if closure is not None else None


@caught_by("closure")
class RunsClosureTwice(Honest):
    def step(self, closure=None):
        if closure is not None:
            closure()
        return super().step(closure)


@caught_by("closure")
class DropsTheLoss(Honest):
    def step(self, closure=None):
        super().step(closure)


@caught_by("gradients_untouched")
class WritesGradients(Honest):
    def update_group(self, group, parameters):
        rows = super().update_group(group, parameters)
        for parameter in parameters:
            local(parameter.grad).mul_(0.5)
        return rows


@caught_by("gradients_untouched")
class ReplacesGradients(Honest):
    def update(self):
        super().update()
        self.zero_grad()


@caught_by("none_gradients")
class DecaysFrozenParameters(Honest):
    def update(self):
        super().update()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    local(parameter).mul_(1 - group["weight_decay"])


@caught_by("zero_gradients")
class DividesByZeroNorm(Honest):
    """The loading step has zero gradients too, but its lr of 0 is caught by the class itself."""

    def directions(self, parameters, gradients, norms):
        if all(group["lr"] == 0 for group in self.param_groups):
            return gradients
        return [gradient / norm for gradient, norm in zip(gradients, norms, strict=True)]


@caught_by("zero_weights")
class LeavesZeroWeights(Honest):
    def directions(self, parameters, gradients, norms):
        sizes = self.norms(parameters, [local(parameter).float() for parameter in parameters])
        directions = super().directions(parameters, gradients, norms)
        return [size * direction for size, direction in zip(sizes, directions, strict=True)]


@caught_by("nan_stays_in_its_layer")
class SpreadsNaN(Honest):
    def directions(self, parameters, gradients, norms):
        return super().directions(parameters, gradients, norms.square().sum().sqrt().expand_as(norms))


@caught_by("nan_shows")
class HidesNaN(Honest):
    def gradients(self, parameters):
        return [gradient.nan_to_num() for gradient in super().gradients(parameters)]


@caught_by("scalar_parameters")
class CountsRows(Honest):
    def state_of(self, parameter):
        assert parameter.shape[0] > 0
        return super().state_of(parameter)


@caught_by("sparse_gradients")
class SkipsSparseGradients(Honest):
    def update_group(self, group, parameters):
        dense = [parameter for parameter in parameters if not parameter.grad.is_sparse]
        return super().update_group(group, dense) if dense else torch.zeros(3, 0)


@caught_by("sparse_gradients")
class CrashesOnSparseGradients(Honest):
    def refuse_sparse(self, parameters):
        for parameter in parameters:
            local(parameter.grad).view_as(local(parameter))


@caught_by("memory_layouts")
class WalksStorage(Honest):
    def gradients(self, parameters):
        pairs = zip(super().gradients(parameters), parameters, strict=True)
        return [gradient.as_strided(gradient.shape, local(parameter).stride()) for gradient, parameter in pairs]


# Options and groups


@caught_by("unknown_option")
def swallows_options() -> Callable[..., Honest]:
    return lambda params, lr=0.1, **_: Honest(params, lr=lr)


class TakesAnyGroupKey(Honest):
    def add_param_group(self, param_group):
        torch.optim.Optimizer.add_param_group(self, param_group)


@caught_by("unknown_group_key")
def takes_any_group_key() -> Callable[..., Honest]:
    return lambda params, lr=0.1: TakesAnyGroupKey(params, lr=lr)


@caught_by("impossible_values")
class AcceptsAnything(Honest):
    def __init__(self, params, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.01):
        super().__init__(params, momentum=momentum, weight_decay=weight_decay)
        self.defaults["lr"] = lr
        for group in self.param_groups:
            if group["lr"] == 0.1:
                group["lr"] = lr


@caught_by("options_arrive")
class DropsNesterov(Honest):
    def move(self, group, parameter, direction):
        super().move({**group, "nesterov": False}, parameter, direction)


@caught_by("group_options")
class ReadsDefaults(Honest):
    def weight_decay(self, group):
        return self.defaults["weight_decay"]


@caught_by("groups_are_independent", "late_group")
class SharesCounterBetweenGroups(Honest):
    """A bias correction whose step count advances once a group."""

    def update_group(self, group, parameters):
        first = self.param_groups[0]
        first["steps"] = first.get("steps", 0) + 1
        return super().update_group(group, parameters)

    def lr(self, group):
        return group["lr"] * (1 - 0.5 ** self.param_groups[0]["steps"])


@caught_by("late_group")
class CountsStepsOnce(Honest):
    """A bias correction whose step count belongs to the optimizer."""

    def update(self):
        steps = self.param_groups[0].get("steps", 0) + 1
        for group in self.param_groups:
            group["steps"] = steps
        super().update()

    def lr(self, group):
        return group["lr"] * (1 - 0.5 ** group["steps"])


@caught_by("parameters_are_read_from_groups")
class KeepsParameters(Honest):
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.kept = [*getattr(self, "kept", []), list(self.param_groups[-1]["params"])]

    def update_group(self, group, parameters):
        index = next(index for index, own in enumerate(self.param_groups) if own is group)
        kept = [parameter for parameter in self.kept[index] if parameter.grad is not None]
        return super().update_group(group, kept) if kept else torch.zeros(3, 0)


@caught_by("lr_as_tensor")
class TurnsLrIntoNumber(Honest):
    def __init__(self, params, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.01):
        super().__init__(params, lr=float(lr), momentum=momentum, weight_decay=weight_decay)


@caught_by("lr_scheduler", "lr_as_tensor")
class KeepsFirstLr(Honest):
    def lr(self, group):
        return group.setdefault("first_lr", group["lr"]) if group["lr"] else group["lr"]


# Precision


@caught_by("low_precision_state")
class KeepsLowPrecisionState(Honest):
    def state_of(self, parameter):
        state = self.state[parameter]
        if not state:
            state["buffer"] = torch.zeros_like(parameter)
        return state


@caught_by("low_precision_state_loaded")
class LetsTorchCastState(Honest):
    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


@caught_by("low_precision_range")
class SquaresInLowPrecision(Honest):
    def norms(self, parameters, tensors):
        return super().norms(parameters, [t.to(p.dtype) for t, p in zip(tensors, parameters, strict=True)]).float()


# State


@caught_by("state_exists_after_first_step", "checkpoint_from_2_ranks_to_1", "checkpoint_from_2_ranks_to_3")
class CreatesStateLate(Honest):
    """A slow average that begins with the second step."""

    def move(self, group, parameter, direction):
        started = bool(self.state[parameter])
        state = self.state_of(parameter)
        if started:
            slow = state.setdefault("slow", torch.zeros_like(state["buffer"]))
            local(slow).mul_(0.9).add_(direction, alpha=0.1)
            direction = direction + local(slow)
        super().move(group, parameter, direction)


@caught_by("loading_step")
class DecaysWithoutLr(Honest):
    def move(self, group, parameter, direction):
        super().move(group, parameter, direction)
        local(parameter).mul_(0.999)


@caught_by("loading_step", "checkpoint_from_2_ranks_to_1", "checkpoint_from_2_ranks_to_3")
class SkipsParametersWithoutLr(Honest):
    def move(self, group, parameter, direction):
        if group["lr"] != 0:
            super().move(group, parameter, direction)


@dataclass(frozen=True)
class Box:
    """No tensor, no number, no string."""


@caught_by("state_dict_is_plain_data")
class StoresObjects(Honest):
    def state_of(self, parameter):
        state = super().state_of(parameter)
        state.setdefault("box", Box())
        return state


@caught_by("resume_equals_uninterrupted", "late_group", "checkpoint_from_2_ranks_to_1", "checkpoint_from_2_ranks_to_3")
class CountsStepsInAttribute(Honest):
    steps = 0

    def update(self):
        self.steps += 1
        super().update()

    def lr(self, group):
        return group["lr"] / self.steps


# Training


@caught_by("grad_scaler_unscales")
class ForgetsGradScale(Honest):
    def gradients(self, parameters):
        return [gradient * getattr(self, "grad_scale", 1.0) for gradient in super().gradients(parameters)]


@caught_by("grad_scaler_skips_overflow")
class ForgetsFoundInf(Honest):
    def overflowed(self):
        return False


@caught_by("accelerate")
class RefusesEmptyState(Honest):
    def load_state_dict(self, state_dict):
        if not state_dict["state"]:
            raise ValueError("there is no state to load")
        super().load_state_dict(state_dict)


@caught_by("meta_tensors")
class ReadsNormsOnHost(Honest):
    def directions(self, parameters, gradients, norms):
        return [gradient / (1 + norm.item()) for gradient, norm in zip(gradients, norms, strict=True)]


@caught_by("torch_compile")
class DiffersWhenCompiled(Honest):
    def lr(self, group):
        return 0.5 * group["lr"] if torch.compiler.is_compiling() else group["lr"]


@caught_by("torch_compile")
class CompilesEveryStep(Honest):
    """A bias correction as a Python number that is another one at every step."""

    def lr(self, group):
        group["left"] = group.get("left", 1.0) * 0.99
        return group["lr"] * (1 - group["left"])


@caught_by("fused_equals_plain")
class FusedForgetsDecay(Honest):
    def __init__(self, params, *, lr: float = 0.1, weight_decay: float = 0.01, fused: bool = False):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.fused = fused

    def weight_decay(self, group):
        return 0.0 if self.fused else group["weight_decay"]


# Statistics


@caught_by("layer_stats_shape")
class NamesOneLayerTwice(Honest):
    def statistics(self, names, sizes, norms, steps):
        values = super().statistics(names, sizes, norms, steps).values
        return LayerStats([*names, names[0]], {key: torch.cat([v, v[:1]]) for key, v in values.items()})


@caught_by("layer_stats_shape")
class ReportsOneValueForAllLayers(Honest):
    def statistics(self, names, sizes, norms, steps):
        return LayerStats(names, {"mean_ratio": (steps / sizes).mean()})


@caught_by("layer_stats_truth")
class ReportsWrongNorms(Honest):
    def statistics(self, names, sizes, norms, steps):
        return super().statistics(names, sizes, norms * 1.01, steps)


@caught_by("layer_stats_change_nothing")
class TrainsSlowerWhenLogged(Honest):
    def lr(self, group):
        return group["lr"] * (0.99 if self.track_layer_stats else 1.0)


@caught_by("layer_stats_sharded")
class ReportsLocalStatistics(Honest):
    def statistics(self, names, sizes, norms, steps):
        parts = 2 if dist.is_initialized() else 1
        return super().statistics(names, sizes / parts, norms, steps / parts)


# Sharding


@caught_by("fsdp2_with_replicated_parameters")
class AddsUpReplicatedNorms(Honest):
    def norms(self, parameters, tensors):
        squares = torch.stack([tensor.square().sum() for tensor in tensors])
        anything_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        return (self.over_ranks(squares) if anything_sharded else squares).sqrt()


@caught_by(
    "fsdp2_equals_one_process",
    "fsdp2_with_replicated_parameters",
    "layer_stats_sharded",
    "checkpoint_from_2_ranks_to_1",
    "checkpoint_from_2_ranks_to_3",
)
class TakesLocalNorms(Honest):
    def over_ranks(self, values):
        return values


@caught_by("collectives_do_not_grow_with_layers")
class ReducesLayerByLayer(Honest):
    def over_ranks(self, values):
        return torch.cat([super(ReducesLayerByLayer, self).over_ranks(value) for value in values.split(1)])


@caught_by("checkpoint_from_2_ranks_to_1", "checkpoint_from_2_ranks_to_3")
class KeepsShardsAsPlainTensors(Honest):
    def state_of(self, parameter):
        state = self.state[parameter]
        if not state:
            state["buffer"] = torch.zeros_like(local(parameter), dtype=torch.float32)
        return state
