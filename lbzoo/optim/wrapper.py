"""An optimizer around another: it changes the gradients and leaves everything else to the one inside.

A wrapper is registered under a prefix (``@register_optimizer_wrapper("larc_")``) and works around any optimizer, ours,
torch's or one of another package. Groups and state are the base's, so that schedulers, checkpoints and engines that
swap parameters see one ordinary optimizer. The base steps on new tensors in the place of ``p.grad``, which costs one
more copy of the gradients; afterwards the gradients are back as they were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from lbzoo.optim.batch import Batch, make_batches
from lbzoo.optim.checks import check_group
from lbzoo.optim.elementwise import sweep
from lbzoo.optim.layer_stats import LayerStats
from lbzoo.optim.layerwise import (
    has_overflowed,
    norms_of_change,
    refuse_flat_buffers,
    refuse_last_group,
    refuse_sparse_gradient,
    trust_ratio,
)
from lbzoo.optim.rules import Rule, collect_reports, param_name, run_batches
from lbzoo.optim.state import load_with_precision
from lbzoo.sharding import local, with_local


class OptimizerWrapper(Optimizer):
    """Base of the wrappers. A subclass has a rule that changes the gradients of a batch.

    ``defaults``: the wrapper's own group options, beside those of ``base``. A subclass that keeps state of a parameter
    names it in ``state_keys``.
    """

    track_layer_stats: bool = False
    state_keys: tuple[str, ...] = ()

    def __init__(self, base: Optimizer, defaults: dict[str, Any]) -> None:
        self.base = base
        self._own_defaults = dict(defaults)
        self._new_states: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._layer_stats = LayerStats()
        groups, state = base.param_groups, base.state
        super().__init__(groups, {**base.defaults, **defaults})  # puts the base's groups through add_param_group again
        self.state = state

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """All the state that the wrapper will ever keep of ``param``, with the keys ``state_keys``."""
        return {}

    def rule(self, batch: Batch) -> Rule:
        """Put new tensors into ``batch.grads``; report what there is to say of them (see :mod:`lbzoo.optim.rules`)."""
        raise NotImplementedError

    def layer_stats(self) -> LayerStats:
        """Of the last step that ran while ``track_layer_stats`` was True: the base's, if it has any, beside our own."""
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
        batches = self._batches()
        reports = run_batches(batches, self._process)
        before = self._copies() if self.track_layer_stats and not hasattr(self.base, "layer_stats") else {}
        self._step_base(batches)
        for param, state in self._new_states:
            self.state[param].update(state)  # only now: a base without state of its own takes any for its own
        self._new_states.clear()
        if self.track_layer_stats:
            self._layer_stats = self._with_stats_of_base(collect_reports(reports, self.param_groups), before)
        return loss

    def _process(self, batch: Batch) -> Rule:
        batch.load(getattr(self, "grad_scale", None))
        # Handed on as it is: torch.compile cannot trace `yield from` into a rule that yields nothing.
        return self._rule_with_norms(batch) if self.track_layer_stats else self.rule(batch)

    def _rule_with_norms(self, batch: Batch) -> Rule:
        param_norms, grad_norms = yield sweep(None, [batch.params, batch.grads], norms_of=[0, 1])
        report = yield from self.rule(batch)
        return {**report, "param_norm": param_norms, "grad_norm": grad_norms}

    def _step_base(self, batches: Sequence[Batch]) -> None:
        adapted = [(owner, grad) for batch in batches for owner, grad in zip(batch.owners, batch.grads, strict=True)]
        kept = [owner.grad for owner, _ in adapted]
        try:
            for owner, grad in adapted:
                owner.grad = with_local(owner, grad.to(owner.dtype))
            if hasattr(self.base, "track_layer_stats"):
                self.base.track_layer_stats = self.track_layer_stats
            self.base.step()
        finally:
            for (owner, _), kept_grad in zip(adapted, kept, strict=True):
                owner.grad = kept_grad

    def _with_stats_of_base(self, own: LayerStats, before: dict[Tensor, Tensor]) -> LayerStats:
        """Where the base has statistics, its own (but the norm of the gradient as it came); else what it did.

        Its direction is then the step over the learning rate.
        """
        if not own.names:
            return own
        if hasattr(self.base, "layer_stats"):
            values = {**own.values, **self.base.layer_stats().values, "grad_norm": own.values["grad_norm"]}
            return LayerStats(own.names, values)

        def change(batch: Batch) -> Rule:
            after = [local(owner) for owner in batch.owners]
            step_norms = yield from norms_of_change([before.get(owner, owner) for owner in batch.owners], after)
            return {"step_norm": step_norms, "lr": torch.ones_like(step_norms) * batch.lr}

        moved = collect_reports(run_batches(self._batches(), change), self.param_groups).values
        norms, step_norms = own.values["param_norm"], moved["step_norm"]
        measured = {
            "trust_ratio": trust_ratio(moved["lr"] * norms, step_norms),
            "update_ratio": torch.where(norms == 0, 0.0, step_norms / norms),
        }
        return LayerStats(own.names, {**measured, **own.values})

    def _copies(self) -> dict[Tensor, Tensor]:
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        return {param: local(param).clone() for param in params}

    def _batches(self) -> list[Batch]:
        refuse_flat_buffers(self.param_groups)
        return make_batches(self.param_groups, self._state_of, self.new_state)

    def _state_of(self, param: Tensor, group: int, position: int) -> dict[str, Any]:
        if param.grad is not None and param.grad.layout is not torch.strided:
            refuse_sparse_gradient(param_name(self.param_groups, group, position), type(self).__name__)
        held: dict[str, Any] = self.state.get(param, {})
        if all(key in held for key in self.state_keys):
            return held
        state = self.new_state(param, self.param_groups[group])
        self._new_states.append((param, state))
        return state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; raises UsageError for options out of range and parameters that
        no layer-wise rule can take.
        """
        own = {key: param_group.setdefault(key, default) for key, default in self._own_defaults.items()}
        check_group(own, f"{type(self).__name__}, parameter group {len(self.param_groups)}")
        self.base.add_param_group(param_group)
        refuse_last_group(self)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the state of both."""
        load_with_precision(self.base, self.base.load_state_dict, state_dict, self.state_keys)

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("defaults", "base", "_own_defaults", "_new_states", "_layer_stats")}
