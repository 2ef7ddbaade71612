"""The tensors that go through an update rule together, as the rule sees them: local to this rank, in full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lbzoo.optim.elementwise import SMALL, are_contiguous, is_dense, same_layout
from lbzoo.optim.state import state_dtype
from lbzoo.sharding import ShardGroups, local, local_gradient, local_parts, shard_groups

StateOf: TypeAlias = Callable[[Tensor, int, int], dict[str, Any]]  # of (parameter, index of its group, position in it)
AtOnce: TypeAlias = Callable[[Any, torch.device], bool]  # of (group, device)
NewState: TypeAlias = Callable[[Tensor, dict[str, Any]], dict[str, Tensor]]  # of (parameter, its group)

# Elements a batch, unless one tensor has more: bounds the temporaries of a step. On a CPU a second pass shall also find
# the first in the cache.
CPU_LIMIT = 1 << 21
ACCELERATOR_LIMIT = 1 << 26


class Scratch:
    """Memory for the temporaries of one batch after another: a buffer a slot, as long as the largest batch.

    It stays between steps: on a CPU, touching fresh pages costs a tenth of a step. Small tensors do without; malloc
    gives them pages that it has.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def flat(self, size: int, dtype: torch.dtype, slot: int = 0) -> Tensor:
        key = (slot, dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype)
        return self._buffers[key][:size]

    def like(self, tensors: Sequence[Tensor], slot: int) -> list[Tensor]:
        buffer = self.flat(sum(tensor.numel() for tensor in tensors), tensors[0].dtype, slot)
        taken, result = 0, []
        for tensor in tensors:
            size = tensor.numel()
            if size <= SMALL or not is_dense(tensor):
                result.append(torch.empty_like(tensor))
            else:
                result.append(buffer.as_strided(tensor.shape, tensor.stride(), taken))
                taken += size
        return result


@dataclass
class Batch:
    """Parameters of one group that go through the rule together.

    Between :meth:`load` and :meth:`store`, ``params`` and ``grads`` hold this rank's parts: the parameters themselves,
    or float32 copies where they have less precision, and gradients of the same type and layout.

    In a batch of sharded parameters ``width`` counts all those of the group that some rank may have a gradient for, and
    ``columns`` says which of them are here: what the ranks exchange has the same length on all.
    """

    group: dict[str, Any]
    shards: ShardGroups = ()
    scratch: Scratch | None = None
    owners: list[Tensor] = field(default_factory=list)  # as the group holds them
    states: list[dict[str, Any]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # (index of the group, position in it)
    columns: list[int] = field(default_factory=list)
    width: int = 0
    size: int = 0  # elements on all ranks
    limit: float = math.inf  # of size, for more than one tensor
    small: bool = False  # of small tensors alone, for which a call costs more than the elements
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def add(self, owner: Tensor, state: dict[str, Any], place: tuple[int, int]) -> None:
        self.owners.append(owner)
        self.states.append(state)
        self.places.append(place)
        self.columns.append(self.width)

    def add_stand_in(self, new_state: NewState) -> None:
        """Give the rule a tensor to run on where no gradient is here: other ranks may wait for its exchange."""
        stand_in = torch.zeros(1, device=local(self.group["params"][0]).device)
        stand_in.grad = torch.zeros_like(stand_in)
        self.owners.append(stand_in)
        self.states.append(new_state(stand_in, self.group))

    def load(self, grad_scale: Tensor | None) -> None:
        params, grads = local_parts(self.owners), [local_gradient(owner) for owner in self.owners]
        dtype = state_dtype(params[0])  # a batch has one type
        self.params = [param.to(dtype) for param in params] if params[0].dtype is not dtype else params
        if grad_scale is not None:
            grads = [grad.to(dtype) / grad_scale.to(grad.device) for grad in grads]
        if not (are_contiguous(self.params) and are_contiguous(grads) and all(grad.dtype is dtype for grad in grads)):
            grads = [_laid_out_as(param, grad) for param, grad in zip(self.params, grads, strict=True)]
        self.grads = grads

    def store(self) -> None:
        """Write copies back, and let go of the tensors."""
        if self.owners[0].dtype is not self.params[0].dtype:
            for owner, param in zip(self.owners, self.params, strict=True):
                local(owner).copy_(param)
        self.params, self.grads = [], []

    def part(self, indices: Sequence[int]) -> Batch:
        """The loaded tensors with these indices as a batch of their own."""
        lists = ("owners", "states", "places", "columns", "params", "grads")
        parts: dict[str, Any] = {name: [getattr(self, name)[index] for index in indices] for name in lists}
        return replace(self, **parts)

    def state(self, key: str) -> list[Tensor]:
        return local_parts(state[key] for state in self.states)

    def count_steps(self) -> list[Tensor]:
        """Count this step for every tensor; the state that counts."""
        counts = local_parts(state["step"] for state in self.states if "step" in state)
        if counts:
            torch._foreach_add_(counts, torch.ones((), device="cpu"), alpha=1.0)  # of its forms the quickest by far
        return counts

    def next_steps(self) -> list[Any]:
        """Count this step for every tensor; the numbers, from 1 (tensors under torch.compile)."""
        counts = self.count_steps()
        if torch.compiler.is_compiling():
            return [count.double() for count in counts]  # 1 - beta^t cancels
        return [count.item() for count in counts]

    def temporaries(self, slot: int = 0) -> list[Tensor]:
        """Uninitialised tensors like ``params``. With the same slot, the next batch is given the same memory."""
        if self.scratch is None:
            return [torch.empty_like(param) for param in self.params]
        return self.scratch.like(self.params, slot)

    @property
    def lr(self) -> float | Tensor:
        """The learning rate, as a number wherever it can be read without waiting for a device."""
        return learning_rate(self.group)


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """Of a parameter group, as a number wherever it can be read without waiting for a device."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and not torch.compiler.is_compiling():
        return lr.item()
    return lr


def make_batches(
    param_groups: Sequence[dict[str, Any]],
    state_of: StateOf,
    new_state: NewState,
    *,
    scratch: Scratch | None = None,
    at_once: AtOnce | None = None,
) -> list[Batch]:
    """All parameters with a gradient, by group, shards, device, type and form.

    ``new_state`` makes the state of a stand-in (see Batch). ``scratch`` serves the batches that run one after another:
    those on the CPU without sharded parameters. ``at_once``, asked for a group and a device, leaves the size of batches
    without limit: for a rule that keeps no temporaries of a whole batch.
    """
    batches: list[Batch] = []
    for index, group in enumerate(param_groups):
        current: dict[Any, Batch] = {}
        for position, param in enumerate(group["params"]):
            shards, has_gradient = shard_groups(param), param.grad is not None
            if not has_gradient and not (shards and param.requires_grad):
                continue
            state = state_of(param, index, position) if has_gradient else {}  # refuses what has no layout
            form = None if shards else _form(param)
            kind = (shards, param.device, param.dtype, form)
            batch, size = current.get(kind), param.numel()
            if batch is None or batch.size + size > batch.limit:
                batch = current[kind] = Batch(group, shards)
                if form is not None:
                    _prepare_to_run_alone(batch, form, param.device, scratch, at_once)
                batches.append(batch)
            if has_gradient:
                batch.add(param, state, (index, position))
            batch.width += 1
            batch.size += size
        for batch in current.values():
            if not batch.owners:
                batch.add_stand_in(new_state)
    return batches


def _form(param: Tensor) -> str:
    """How a batch of such tensors is worked on: small ones together, plain ones as they are, others on copies."""
    if param.device.type == "cpu" and param.numel() <= SMALL:
        return "small"
    assert param.grad is not None
    same_type = param.grad.dtype is param.dtype and state_dtype(param) is param.dtype
    return "plain" if same_type and is_dense(param) and same_layout(param, param.grad) else "other"


def _prepare_to_run_alone(
    batch: Batch, form: str, device: torch.device, scratch: Scratch | None, at_once: AtOnce | None
) -> None:
    on_cpu = device.type == "cpu"
    batch.small = form == "small"
    batch.scratch = scratch if on_cpu else None
    if form != "plain" or at_once is None or not at_once(batch.group, device):
        batch.limit = CPU_LIMIT if on_cpu else ACCELERATOR_LIMIT


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    if grad.dtype is param.dtype and same_layout(grad, param):
        return grad
    return torch.empty_like(param).copy_(grad)
