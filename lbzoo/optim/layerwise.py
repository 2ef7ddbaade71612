"""The step that all layer-wise optimizers share, and the maths that they have in common.

An update rule is a generator function over lists of tensors. It does what it can with the parts that this rank holds,
yields the :class:`~lbzoo.optim.elementwise.Norms` of those parts, is sent the norms of the whole tensors, and applies
the step::

    def rule(params, grads, ...):
        partial = sweep(kernel, [params, grads, updates], norms_of=[0, 2])
        param_norms, update_norms = yield partial
        add_scaled_(params, updates, -lr * trust_ratio(param_norms, update_norms))

So a rule reads from top to bottom and knows nothing of sharding, and :class:`LayerwiseOptimizer` can run the rules of
all groups side by side: each round of yields is one all_reduce for the whole model. Where nothing is sharded the
parameters go through the rule in batches, one after another, so that a step needs little memory beyond the state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from lbzoo.errors import UsageError
from lbzoo.optim.batch import Batch, Scratch, state_dtype
from lbzoo.optim.checks import check_group
from lbzoo.optim.elementwise import Norms, same_layout, sweep
from lbzoo.optim.layer_stats import LayerStats
from lbzoo.sharding import local, reduce_over_shards, refuse_flat_parameter, shard_groups

# What a rule says of its tensors where it is asked to, [tensors] each: "step_norm" |step|; "trust_ratio", or
# "direction_norm" |u| where the rule applies none; and what else it knows.
Report: TypeAlias = dict[str, Tensor]
Rule: TypeAlias = Generator[Norms, Any, Report]


def trust_ratio(
    param_norms: Tensor, update_norms: Tensor, weight_norm_range: tuple[float, float] | None = None
) -> Tensor:
    """phi(|x|) / |u|, and 1 where either is 0: tensors that start at zero must be able to move. NaN stays NaN.

    phi clamps to ``weight_norm_range``; None is the identity.
    """
    if weight_norm_range is not None:
        param_norms = param_norms.clamp(*weight_norm_range)
    undefined = (param_norms == 0) | (update_norms == 0)
    return torch.where(undefined, torch.ones_like(param_norms), param_norms / update_norms)


def run_rules(batches: Sequence[Batch], rules: Sequence[Rule]) -> list[Report]:
    """Run the rules side by side to their ends. What they yield in a round is exchanged between the ranks at once."""
    reports: dict[int, Report] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(rules)))
    while answers:
        requests: dict[int, Norms] = {}
        for index, answer in answers.items():
            try:
                requests[index] = rules[index].send(answer)
            except StopIteration as end:
                reports[index] = end.value
        answers = _exchange(batches, requests)
    return [reports[index] for index in range(len(rules))]


def _exchange(batches: Sequence[Batch], requests: dict[int, Norms]) -> dict[int, Tensor | None]:
    """The norms of the whole tensors: one all_reduce for all requests over the same shards with the same operation."""
    answers: dict[int, Tensor | None] = {}
    together: dict[Any, list[int]] = {}
    for index, request in requests.items():
        if batches[index].shards:
            key = (batches[index].shards, request.reduce_op, request.parts.device)
            together.setdefault(key, []).append(index)
        else:
            answers[index] = request.root(request.parts)
    for (shards, op, _), indices in together.items():
        blocks = [_spread(requests[index].parts, batches[index]) for index in indices]
        flat = torch.cat([block.reshape(-1) for block in blocks])
        reduced = reduce_over_shards(flat, shards, op).split([block.numel() for block in blocks])
        for index, block, values in zip(indices, blocks, reduced, strict=True):
            parts = _gather(values.view_as(block), batches[index]).to(requests[index].parts.dtype)
            answers[index] = requests[index].root(parts)
    return answers


def _spread(parts: Tensor, batch: Batch) -> Tensor:
    """[rows, width], the same shape on every rank; 0 where this rank has no gradient."""
    if batch.width == len(batch.columns):
        return parts.double()
    spread = torch.zeros(len(parts), batch.width, dtype=torch.float64, device=parts.device)
    if batch.columns:
        spread[:, batch.columns] = parts.double()
    return spread


def _gather(values: Tensor, batch: Batch) -> Tensor:
    """The columns of this rank's tensors; zeros for the stand-in of a batch that has none."""
    if batch.width == len(batch.columns):
        return values
    return values[:, batch.columns] if batch.columns else values.new_zeros(len(values), 1)


class LayerwiseOptimizer(Optimizer):
    """Base of the layer-wise optimizers. A subclass says what state a parameter has and which rule a batch follows.

    State and norms are float32 for parameters of less precision. ``p.grad`` is never written. Sparse gradients, complex
    parameters and flat parameters (FSDP1, ZeRO) are refused. A ``GradScaler`` unscales the gradients itself, so that
    they can be clipped in between; where ``grad_scale`` and ``found_inf`` are set on the optimizer instead, they are
    honoured (reading ``found_inf`` waits for the device).
    """

    track_layer_stats: bool = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._layer_stats = LayerStats()
        self._scratch = Scratch()
        super().__init__(params, defaults)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """All the state that ``param`` will ever have: a key that came later would be lost by checkpoints."""
        raise NotImplementedError

    def rule(self, batch: Batch) -> Rule:
        """The update of a batch; see the module's docstring."""
        raise NotImplementedError

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
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return loss
        batches = self._batches()
        joint = [batch for batch in batches if batch.shards]
        rounds = [[batch] for batch in batches if not batch.shards] + ([joint] if joint else [])
        reports: list[tuple[Batch, Report]] = []
        for members in rounds:
            reports += zip(members, run_rules(members, [self._process(batch) for batch in members]), strict=True)
        if self.track_layer_stats:
            self._layer_stats = self._collect(reports)
        return loss

    def _process(self, batch: Batch) -> Rule:
        batch.load(getattr(self, "grad_scale", None))
        if not self.track_layer_stats:
            yield from self.rule(batch)
            batch.store()
            return {}
        param_norms, grad_norms = yield sweep(None, [batch.params, batch.grads], norms_of=[0, 1])
        report = yield from self.rule(batch)
        batch.store()
        if "direction_norm" in report:
            report["trust_ratio"] = trust_ratio(param_norms, report.pop("direction_norm"))
        step_norms = report.pop("step_norm")
        report["update_ratio"] = torch.where(param_norms == 0, torch.zeros_like(step_norms), step_norms / param_norms)
        return {**report, "param_norm": param_norms, "grad_norm": grad_norms}

    def _batches(self) -> list[Batch]:
        """All parameters with a gradient, by group, shards, device and type. State is made for those that have none."""
        batches: list[Batch] = []
        for index, group in enumerate(self.param_groups):
            self._check_names(index, group)
            current: dict[Any, Batch] = {}
            for position, param in enumerate(group["params"]):
                shards = shard_groups(param)
                if param.grad is None and not (shards and param.requires_grad):
                    continue
                key = (shards, param.device, param.dtype)
                batch = current.get(key)
                if batch is None or not (shards or batch.has_room(param)):
                    scratch = self._scratch if param.device.type == "cpu" and not shards else None
                    batch = current[key] = Batch(group, shards, scratch)
                    batches.append(batch)
                if param.grad is not None:
                    batch.add(param, self._state_of(param, index, position), (index, position))
                batch.width += 1
        for batch in batches:
            if not batch.owners:
                self._add_stand_in(batch)
        return batches

    def _add_stand_in(self, batch: Batch) -> None:
        """Give a batch without gradients on this rank a tensor to run the rule on: others may wait for its share."""
        device = local(batch.group["params"][0]).device
        stand_in = torch.zeros(1, device=device)
        stand_in.grad = torch.zeros_like(stand_in)
        batch.owners.append(stand_in)
        batch.states.append(self.new_state(stand_in, batch.group))

    def _state_of(self, param: Tensor, group: int, position: int) -> dict[str, Any]:
        assert param.grad is not None
        if param.grad.layout is not torch.strided:
            raise UsageError(
                f"{self._name(group, position)} has a sparse gradient, for which {type(self).__name__} has no rule: "
                "give the embedding sparse=False, or its parameters to torch.optim.SparseAdam"
            )
        state: dict[str, Any] = self.state[param]
        if not state:
            self._refuse_param(param, group, position)
            state.update(self.new_state(param, self.param_groups[group]))
        return state

    def _collect(self, reports: Sequence[tuple[Batch, Report]]) -> LayerStats:
        """One row a tensor, in the order of the groups, whatever the order of the batches; nothing is read back."""
        rows: dict[tuple[int, int], dict[str, Tensor]] = {}
        for batch, report in reports:
            columns = {key: values.unbind() for key, values in report.items()}
            for index, place in enumerate(batch.places):
                rows[place] = {key: values[index] for key, values in columns.items()}
        places = sorted(rows)
        device = next(iter(rows[places[0]].values())).device if places else None
        keys = rows[places[0]] if places else ()
        values = {key: torch.stack([rows[place][key].to(device) for place in places]).float() for key in keys}
        return LayerStats([self._name(*place) for place in places], values)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises UsageError for options out of range and parameters that the rule cannot take."""
        index = len(self.param_groups)
        check_group({**self.defaults, **param_group}, f"{type(self).__name__}, parameter group {index}")
        super().add_param_group(param_group)
        try:
            for position, param in enumerate(self.param_groups[index]["params"]):
                self._refuse_param(param, index, position)
        except UsageError:
            del self.param_groups[index]
            raise

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state; unlike torch's own, float32 state of parameters of less precision stays float32."""
        loaded: StateDict = {}

        def remember(_: Optimizer, seen: StateDict) -> None:
            loaded.update(seen)

        handle = self.register_load_state_dict_pre_hook(remember)  # after those that may have changed it
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for saved_group, group in zip(loaded["param_groups"], self.param_groups, strict=True):
            for key, param in zip(saved_group["params"], group["params"], strict=True):
                for name, value in loaded["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and name != "step":
                        self.state[param][name] = _restored(value, param)

    def _refuse_param(self, param: Tensor, group: int, position: int) -> None:
        name = self._name(group, position)
        refuse_flat_parameter(param, name)
        if param.is_complex():
            raise UsageError(f"{name} is complex: train its torch.view_as_real() instead")

    def _check_names(self, index: int, group: dict[str, Any]) -> None:
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            raise UsageError(
                f"parameter group {index} has {len(group['param_names'])} names but {len(group['params'])} parameters: "
                "something (DeepSpeed ZeRO?) has put flat buffers in their place, whose layers' norms are lost"
            )

    def _name(self, group: int, position: int) -> str:
        names = self.param_groups[group].get("param_names")
        return str(names[position]) if names else f"group{group}.{position}"


def new_average(param: Tensor) -> Tensor:
    """A moving average like the parameter, sharded as it is."""
    return torch.zeros_like(param, dtype=state_dtype(param))


def new_layer_scalar(param: Tensor) -> Tensor:
    """A number kept for the whole tensor, 0-dim, the same on every rank."""
    return torch.zeros((), dtype=state_dtype(param), device=local(param).device)


def new_step_count() -> Tensor:
    """0-dim float32 on the host, where reading it costs nothing."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def _restored(value: Tensor, param: Tensor) -> Tensor:
    """A loaded value in the precision of the state, on the parameter's device and in its memory layout."""
    value = value.to(device=param.device, dtype=state_dtype(param), copy=True)
    if value.shape == param.shape and not same_layout(value, param):
        return torch.empty_like(param, dtype=value.dtype).copy_(value)
    return value
