"""Gradients under DistributedDataParallel: squares travel with the gradients, one all_reduce of twice the length.

Each rank adds up the squares of its own backward passes, also under ``no_sync()``. When DDP reduces a bucket, its
communication hook sends [gradients | squares] in float32 at least, and both come back as means over the ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lbzoo.errors import UsageError
from lbzoo.gsnr.local import Switch, watch
from lbzoo.gsnr.sums import GradientSums, norm_of


class _Socket:
    """What is registered as DDP's hook, once in its life: DDP takes no second one. ``backend`` comes and goes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.backend: DDPBackend | None = None


_sockets: weakref.WeakKeyDictionary[DistributedDataParallel, _Socket] = weakref.WeakKeyDictionary()


class DDPBackend:
    """A model inside DistributedDataParallel."""

    def __init__(self, model: DistributedDataParallel, all_sums: Sequence[GradientSums], pool_size: int) -> None:
        self.ranks = dist.get_world_size(model.process_group)
        self._sums = {sums.parameter: sums for sums in all_sums}
        self._socket = _socket_of(model)
        self._socket.backend = self
        self.switch = Switch()
        self._handles = [watch(sums, pool_size, self.switch) for sums in all_sums]

    def finish(self, all_sums: Iterable[GradientSums]) -> None:
        """Nothing is left to do: the buckets came back complete."""

    def detach(self) -> None:
        self._socket.backend = None
        for handle in self._handles:
            handle.remove()

    def reduce(self, bucket: dist.GradBucket, group: dist.ProcessGroup) -> Future[Tensor]:
        """[gradients | squares] of a bucket, averaged over the ranks."""
        buffer = bucket.buffer()
        length = buffer.numel()
        both = buffer.new_empty(2 * length, dtype=torch.promote_types(buffer.dtype, torch.float32))
        both[:length].copy_(buffer)
        both[length:].zero_()
        # In the bucket a gradient lies as its parameter does, which need not be row by row.
        views = bucket.gradients()
        places = [
            both.as_strided(view.size(), view.stride(), length + view.storage_offset() - buffer.storage_offset())
            for view in views
        ]
        members = [self._sums.get(parameter) for parameter in bucket.parameters()]
        for sums, place in zip(members, places, strict=True):
            if sums is not None:
                if sums.parameter.grad is None:
                    sums.restart()  # not used on this rank since zero_grad()
                sums.close_pool()  # a synchronised backward pass is the last of its window
                if sums.squares is not None:
                    place.copy_(sums.squares)
        both.div_(self.ranks)
        reduced = dist.all_reduce(both, group=group, async_op=True).get_future()

        def store(_: Any) -> Tensor:
            buffer.copy_(both[:length])
            for sums, place in zip(members, places, strict=True):
                if sums is not None:
                    sums.squares = place.clone() if sums.squares is None else sums.squares.copy_(place)
            for sums, view in zip(members, views, strict=True):
                if sums is not None:
                    sums.norm = norm_of(view)  # p.grad is this, or becomes a copy of it
            return buffer

        finished: Future[Tensor] = reduced.then(store)
        return finished


def _socket_of(model: DistributedDataParallel) -> _Socket:
    if model not in _sockets:
        socket = _Socket(model.process_group)
        try:
            model.register_comm_hook(socket, _hook)
        except RuntimeError as error:
            raise UsageError(
                "GradientStats sends squares along with DDP's gradients, but this DDP has a communication hook "
                f"already, which has to go ({error})"
            ) from error
        _sockets[model] = socket
    return _sockets[model]


def _hook(socket: _Socket, bucket: dist.GradBucket) -> Future[Tensor]:
    if socket.backend is None or not socket.backend.switch.is_on:
        return allreduce_hook(socket.group, bucket)
    return socket.backend.reduce(bucket, socket.group)


# DDP compares the annotations with the classes themselves, not with their names.
_hook.__annotations__.update({"bucket": dist.GradBucket, "return": Future[Tensor]})
