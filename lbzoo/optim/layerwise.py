"""The optimizer class that all layer-wise rules share, and the maths that they have in common."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from lbzoo.errors import UsageError
from lbzoo.optim import fused_kernels
from lbzoo.optim.batch import Batch, Scratch, make_batches
from lbzoo.optim.by_tensor import TensorStep, split_flat
from lbzoo.optim.checks import check_group
from lbzoo.optim.elementwise import Norms, sweep
from lbzoo.optim.layer_stats import LayerStats
from lbzoo.optim.rules import Rule, collect_reports, param_name, run_batches
from lbzoo.optim.state import load_with_precision
from lbzoo.sharding import refuse_flat_parameter


def trust_ratio(
    param_norms: Tensor, update_norms: Tensor, weight_norm_range: tuple[float, float] | None = None
) -> Tensor:
    """phi(|x|) / |u|, and 1 where either is 0: tensors that start at zero must be able to move. NaN stays NaN.

    phi clamps to ``weight_norm_range``; None is the identity.
    """
    if weight_norm_range is not None:
        param_norms = param_norms.clamp(*weight_norm_range)
    undefined = (param_norms == 0) | (update_norms == 0)
    return torch.where(undefined, 1.0, param_norms / update_norms)


def trust_ratio_of(
    param_norm: float, update_norm: float, weight_norm_range: tuple[float, float] | None = None
) -> float:
    """:func:`trust_ratio` for one tensor, with numbers."""
    if weight_norm_range is not None:
        param_norm = min(max(param_norm, weight_norm_range[0]), weight_norm_range[1])
    return 1.0 if param_norm == 0 or update_norm == 0 else param_norm / update_norm


def inverse_norms(norms: Tensor, eps: float = 0.0) -> Tensor:
    """1 / (norm + eps), and 0 where the norm is 0: a tensor scaled by it stays zero instead of becoming NaN."""
    return torch.where(norms == 0, 0.0, 1 / (norms + eps))


def inverse_norm(norm: float, eps: float = 0.0) -> float:
    """:func:`inverse_norms` for one tensor, with numbers."""
    return 0.0 if norm == 0 else 1 / (norm + eps)


def norms_of_change(before: list[Tensor], after: Sequence[Tensor]) -> Generator[Norms, Any, Tensor]:
    """The norms of ``after - before``, for a rule to report; overwrites ``before``."""
    torch._foreach_sub_(before, list(after))
    (norms,) = yield sweep(None, [before], norms_of=[0])
    return norms  # type: ignore[no-any-return]  # what is sent to a generator has no type of its own


def has_overflowed(optimizer: Optimizer) -> bool:
    """Whether somebody has set ``found_inf`` on the optimizer, as a GradScaler does, and it is true."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def refuse_sparse_gradient(name: str, rule: str) -> NoReturn:
    """Raise UsageError for a parameter with a sparse gradient."""
    raise UsageError(
        f"{name} has a sparse gradient, for which {rule} has no rule: give the embedding sparse=False, "
        "or its parameters to torch.optim.SparseAdam"
    )


def refuse_parameter(param: Tensor, name: str) -> None:
    """Raise UsageError for a parameter that no layer-wise rule can take: complex, or lost in a flat buffer."""
    refuse_flat_parameter(param, name)
    if param.is_complex():
        raise UsageError(f"{name} is complex: train its torch.view_as_real() instead")


def refuse_last_group(optimizer: Optimizer) -> None:
    """:func:`refuse_parameter` for the group that was added last, which is taken out again where it is refused."""
    index = len(optimizer.param_groups) - 1
    try:
        for position, param in enumerate(optimizer.param_groups[index]["params"]):
            refuse_parameter(param, param_name(optimizer.param_groups, index, position))
    except UsageError:
        del optimizer.param_groups[index]
        raise


def refuse_flat_buffers(param_groups: Sequence[dict[str, Any]]) -> None:
    """Raise UsageError where somebody has put a few flat buffers into the place of the parameters."""
    for index, group in enumerate(param_groups):
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            raise UsageError(
                f"parameter group {index} has {len(group['param_names'])} names for {len(group['params'])} "
                "parameters: flat buffers (DeepSpeed ZeRO?) have taken their place, in which layers are lost"
            )


class LayerwiseOptimizer(Optimizer):
    """Base of the layer-wise optimizers. A subclass says what state a parameter has and which rule a batch follows.

    State and norms are float32 for parameters of less precision. ``p.grad`` is never written. Sparse gradients, complex
    parameters and flat parameters (FSDP1, ZeRO) are refused. A ``GradScaler`` unscales the gradients itself, so that
    they can be clipped in between; where ``grad_scale`` and ``found_inf`` are set on the optimizer instead, they are
    honoured (reading ``found_inf`` waits for the device).
    """

    track_layer_stats: bool = False
    averages: ClassVar[tuple[str, ...]] = ()  # state laid out like the parameter, in the order of a TensorStep
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # options that are one of a few values

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._layer_stats = LayerStats()
        self._scratch = Scratch()
        super().__init__(params, defaults)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """All the state that ``param`` will ever have: a key that came later would be lost by checkpoints."""
        raise NotImplementedError

    def rule(self, batch: Batch) -> Rule:
        """The update of a batch (see :mod:`lbzoo.optim.rules`)."""
        raise NotImplementedError

    def tensor_step(self, group: Mapping[str, Any]) -> TensorStep | None:
        """The update of one tensor for a CPU (see :mod:`lbzoo.optim.by_tensor`); None where the rule must do."""
        return None

    def works_at_once(self, group: Mapping[str, Any], device: torch.device) -> bool:
        """Whether the step of a group keeps no temporaries of all its tensors."""
        return self._tensor_step_on(device, group) is not None

    def _tensor_step_on(self, device: torch.device, group: Mapping[str, Any]) -> TensorStep | None:
        plain = device.type == "cpu" and not self.track_layer_stats and not torch.compiler.is_compiling()
        return self.tensor_step(group) if plain and fused_kernels.fused_kernels_work("cpu") else None

    def layer_stats(self) -> LayerStats:
        """Of the last step that ran while ``track_layer_stats`` was True; empty before the first."""
        return self._layer_stats

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. ``closure``, run first and with gradients enabled, computes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if has_overflowed(self):
            return loss
        reports = run_batches(self._batches(), self._process)
        if self.track_layer_stats:
            self._layer_stats = collect_reports(reports, self.param_groups)
        return loss

    def _process(self, batch: Batch) -> Rule:
        batch.load(getattr(self, "grad_scale", None))
        if not self.track_layer_stats:
            rest = self._step_by_tensor(batch)
            if rest is not None:
                rule, answer = self.rule(rest), None
                try:  # not `yield from`, which torch.compile cannot trace into a rule that yields nothing
                    while True:
                        answer = yield rule.send(answer)
                except StopIteration:
                    pass
            batch.store()
            return {}
        param_norms, grad_norms = yield sweep(None, [batch.params, batch.grads], norms_of=[0, 1])
        report = yield from self.rule(batch)
        batch.store()
        if "direction_norm" in report:
            report["trust_ratio"] = trust_ratio(param_norms, report.pop("direction_norm"))
        step_norms = report.pop("step_norm")
        report["update_ratio"] = torch.where(param_norms == 0, 0.0, step_norms / param_norms)
        return {**report, "param_norm": param_norms, "grad_norm": grad_norms}

    def _step_by_tensor(self, batch: Batch) -> Batch | None:
        """Step what can go by tensor; the batch of what is left, if any."""
        alone = not (batch.shards or batch.small)
        step = self._tensor_step_on(batch.params[0].device, batch.group) if alone else None
        if step is None:
            return batch
        views, flat, rest = split_flat(batch, self.averages)
        flat.count_steps()
        for tensors, state in zip(views, flat.states, strict=True):
            step(state, *tensors)
        return rest

    def _batches(self) -> list[Batch]:
        refuse_flat_buffers(self.param_groups)
        return make_batches(
            self.param_groups,
            self._state_of,
            self.new_state,
            scratch=self._scratch,
            at_once=self.works_at_once,
        )

    def _state_of(self, param: Tensor, group: int, position: int) -> dict[str, Any]:
        if param.grad is not None and param.grad.layout is not torch.strided:
            refuse_sparse_gradient(param_name(self.param_groups, group, position), type(self).__name__)
        state: dict[str, Any] = self.state[param]
        if not state:
            refuse_parameter(param, param_name(self.param_groups, group, position))
            state.update(self.new_state(param, self.param_groups[group]))
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises UsageError for options out of range and parameters that the rule cannot take."""
        index = len(self.param_groups)
        where = f"{type(self).__name__}, parameter group {index}"
        check_group({**self.defaults, **param_group}, where, self.choices)
        super().add_param_group(param_group)
        refuse_last_group(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy or an unpickled optimizer has only what torch keeps.
        self.__dict__.setdefault("_layer_stats", LayerStats())
        self.__dict__.setdefault("_scratch", Scratch())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state. Unlike torch's own, float32 state of parameters of less precision stays float32."""
        load_with_precision(self, super().load_state_dict, state_dict)
