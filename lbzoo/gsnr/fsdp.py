"""Gradients under FSDP2 and HSDP: squares travel with the gradients in one reduce_scatter of twice the length.

FSDP2 reduces the gradients of a group of parameters at a time. Here its reduce_scatter sends, to every rank, the rank's
[gradients | squares]; the output keeps both halves, so that HSDP's all_reduce over the replicas takes both along. Then
the parameters' own hooks run, group after group, and take their pieces of the squares.

Every reduction is one gradient: with ``set_requires_gradient_sync(False)`` the micro-batches in between count together.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter  # what set_custom_reduce_scatter() takes

from lbzoo.errors import UsageError
from lbzoo.gsnr.local import Switch, watch, watch_sum
from lbzoo.gsnr.sums import GradientSums, norm_of
from lbzoo.sharding import data_parallel_ranks, is_sharded, local, local_gradient, padded_shard_numel, shard_ranks


class FSDPBackend:
    """A model whose parameters are sharded by ``fully_shard``; some may be left whole on every rank."""

    def __init__(self, model: nn.Module, all_sums: Sequence[GradientSums], pool_size: int) -> None:
        sharded = [sums for sums in all_sums if is_sharded(sums.parameter)]
        self._whole = [sums for sums in all_sums if not is_sharded(sums.parameter)]
        self._sharded = {sums.parameter: sums for sums in sharded}
        self.ranks = data_parallel_ranks(sums.parameter for sums in sharded)
        self.pool_size = pool_size
        self.current: _Reduction | None = None
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._modules = [weakref.ref(module) for module in modules]  # they hold this object, and not it them
        for module in modules:
            ranks = {shard_ranks(parameter) for parameter in module.parameters() if is_sharded(parameter)}
            if 1 in ranks and self.ranks > 1:
                raise UsageError("GradientStats: the parameters are replicated, not sharded: use DDP instead")
            if ranks:
                module.set_custom_reduce_scatter(_Reduction(self, ranks.pop()))
        self.switch = Switch()
        self._handles = [watch(sums, pool_size, self.switch) for sums in self._whole]
        self._handles += [watch_sum(sums, self.switch) for sums in self._whole]
        for parameter in self._sharded:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._take))

    def restart(self, parameters: Iterable[Tensor]) -> bool:
        """Begin another window for those of the parameters whose gradient was set to None; whether there are any."""
        stale = [self._sharded[parameter] for parameter in parameters if parameter.grad is None]
        for sums in stale:
            sums.restart()
        return bool(stale)

    def finish(self, all_sums: Iterable[GradientSums]) -> None:
        """Average what the parameters that are whole on every rank have: one all_reduce if there are any.

        The loop has averaged their gradients itself, so their norms say nothing of unscaling or clipping; the factor is
        that of all sharded parameters together whose gradients are finite.
        """
        whole = [sums for sums in self._whole if sums.is_live]
        for sums in whole if self.ranks > 1 else all_sums:
            sums.close_pool()
        if not self._whole:
            return
        sharded = [sums for sums in self._sharded.values() if sums.is_live]
        device = local(next(iter(self._sharded))).device
        then, now = torch.zeros((), device=device), torch.zeros((), device=device)
        for sums in sharded:
            assert sums.norm is not None
            norm = norm_of(local_gradient(sums.parameter))
            is_finite = sums.norm.isfinite() & norm.isfinite()
            then = then + torch.where(is_finite, sums.norm, 0).square()
            now = now + torch.where(is_finite, norm, 0).square()
        squares = [sums.squares for sums in whole if sums.squares is not None]
        flat = torch.cat([then.view(1), now.view(1), *(tensor.reshape(-1).to(device) for tensor in squares)])
        dist.all_reduce(flat)
        factor = torch.where(flat[0] == 0, torch.ones_like(flat[0]), flat[1] / flat[0]).sqrt()
        for tensor, part in zip(squares, flat[2:].split([tensor.numel() for tensor in squares]), strict=True):
            tensor.copy_(part.view_as(tensor)).div_(dist.get_world_size())
        for sums in whole:
            sums.norm = norm_of(local_gradient(sums.parameter)) / factor

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in filter(None, (reference() for reference in self._modules)):
            module.set_custom_reduce_scatter(_PlainReduction())

    def _take(self, parameter: Tensor) -> None:
        """Called by FSDP2 as soon as ``parameter.grad`` holds what the current reduction brought."""
        if not self.switch.is_on:
            return
        assert self.current is not None
        sums = self._sharded[parameter]
        if self.ranks == 1:
            sums.add(self.current.next_piece(parameter).to(local(parameter).device), self.pool_size)
        else:
            squares = self.current.next_piece(parameter).to(local(parameter).device)
            sums.add_reduced(squares, self.current.groups, self.current.passes)
        sums.seal()


class _PlainReduction(ReduceScatter):
    """A reduce_scatter as FSDP2 does it, for after :meth:`FSDPBackend.detach`."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        return _reduce_scatter(output_tensor, input_tensor, group, op, async_op)


def _divisor_before_sum(ranks: int) -> int:
    """What FSDP2 has divided the gradients by; the squares are by its square. The rest comes after the sum, for both.

    It fears overflow in all types but float32 and bfloat16, so in float64 as well, and divides by a power of two around
    the root of the number of ranks.
    """
    divisor = 1
    while ranks % divisor == 0 and ranks / divisor > divisor:
        divisor *= 2
    return divisor


def _reduce_scatter(
    output: Tensor, source: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp, async_op: bool
) -> dist.Work | None:
    work: dist.Work | None = dist.reduce_scatter_tensor(output, source, op=op, group=group, async_op=async_op)
    return work


class _Reduction(ReduceScatter):
    """The reduce_scatter of one FSDP2 module. FSDP2 allocates its input, then its output, then calls it.

    With one rank to shard over FSDP2 does not call it, and copies the input into the output.
    """

    def __init__(self, backend: FSDPBackend, ranks: int) -> None:
        self._backend, self._ranks = backend, ranks
        self._members: dict[Tensor, None] = {}  # the parameters that were served, in their order
        self._input_is_next = True
        self._output = torch.empty(0)
        self._length = self._offset = 0
        self.groups = self.passes = 0  # in the output: more than one where HSDP puts off its all_reduce
        self._pooled: Tensor | None = None
        self._in_pool = 0

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype == torch.float16:
            raise UsageError(
                "GradientStats: FSDP2 reduces gradients in float16, in which their squares overflow: "
                "use MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        if not self._backend.switch.is_on:
            return torch.empty(*size, dtype=dtype, device=device)
        dtype = torch.promote_types(dtype, torch.float32)
        length = int(size[0])
        if self._input_is_next:
            self._input_is_next = False
            self._begin()
            return torch.empty(length, dtype=dtype, device=device)
        self._input_is_next = True
        self._length, self._offset = length, 0
        self._backend.current = self
        self._output = torch.empty(2 * length if self._ranks > 1 else length, dtype=dtype, device=device)
        self.passes += 1
        return self._output

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        if not self._backend.switch.is_on:
            return _reduce_scatter(output_tensor, input_tensor, group, op, async_op)
        gradients = input_tensor.view(self._ranks, -1)
        both = gradients.new_empty(self._ranks, 2, gradients.shape[1])
        both[:, 0] = gradients
        self._put_squares(both[:, 1], gradients)
        if gradients.dtype == torch.float64:
            both[:, 1] *= _divisor_before_sum(self._backend.ranks)
        return _reduce_scatter(output_tensor, both.view(-1), group, op, async_op)

    def next_piece(self, parameter: Tensor) -> Tensor:
        """This rank's part of the squares of ``parameter``; with one rank its gradient."""
        self._members[parameter] = None
        shard = local(parameter)
        start = self._offset + (self._length if self._ranks > 1 else 0)
        piece = self._output[start : start + shard.numel()].view(shard.shape)
        self._offset += padded_shard_numel(parameter)
        if self._offset == self._length:
            self._output = torch.empty(0)
        return piece

    def _begin(self) -> None:
        if not self._offset:
            return  # nothing was served since the last time: HSDP has put off its all_reduce, and the window goes on
        self.groups = self.passes = 0
        if self._backend.restart(self._members):
            self._pooled, self._in_pool = None, 0

    def _put_squares(self, squares: Tensor, gradients: Tensor) -> None:
        if self._backend.pool_size == 1:
            torch.mul(gradients, gradients, out=squares)
            self.groups += 1
            return
        self._pooled = gradients.clone() if self._pooled is None else self._pooled.add_(gradients)
        self._in_pool += 1
        if self._in_pool < self._backend.pool_size:
            squares.zero_()
            return
        torch.mul(self._pooled, self._pooled, out=squares)
        squares.div_(self._in_pool)
        self.groups += 1
        self._pooled, self._in_pool = None, 0
