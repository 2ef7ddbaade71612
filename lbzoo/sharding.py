"""Sharded parameters (FSDP2, HSDP, tensor parallelism): the only module that knows DTensor.

A layer-wise rule needs norms of whole tensors, of which a rank holds shards. It takes partial results of its shards,
and :func:`reduce_over_shards` adds them up over the ranks that hold the rest: only over the mesh dimensions along
which a tensor is sharded, so replicas (HSDP, or plain parameters beside sharded ones) count once. A shard without
elements adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lbzoo.errors import UsageError

ShardGroups: TypeAlias = tuple[ProcessGroup, ...]

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; the tensor itself where it is no DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of ``parameter.grad``, sharded as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if not (isinstance(gradient, DTensor) and isinstance(parameter, DTensor)):
        return gradient
    if gradient.placements != parameter.placements:
        # Tensor parallelism can leave a partial sum, or another layout, in the gradient.
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return gradient.to_local()


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """:func:`local` of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def with_local(tensor: Tensor, shard: Tensor) -> Tensor:
    """A tensor laid out over the ranks as ``tensor`` is, whose part on this rank is ``shard``."""
    if not isinstance(tensor, DTensor):
        return shard
    return DTensor.from_local(
        shard, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.size(), stride=tensor.stride()
    )


def shard_groups(tensor: Tensor) -> ShardGroups:
    """The process groups over which the parts of ``tensor`` add up to the whole; empty where this rank holds it all."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(dimension) > 1
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is laid out over a mesh of ranks, if only of one."""
    return isinstance(tensor, DTensor)


def is_sharded_over(tensor: Tensor, mesh: DeviceMesh) -> bool:
    """Whether ``tensor`` is split along the last dimension of ``mesh``, and the same along the others."""
    return (
        isinstance(tensor, DTensor)
        and tensor.device_mesh == mesh
        and tensor.placements[-1].is_shard()
        and all(placement.is_replicate() for placement in tensor.placements[:-1])
    )


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts, on every rank. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data_parallel_ranks(parameters: Iterable[Tensor]) -> int:
    """The ranks that see different samples: all of the mesh on which FSDP2 or HSDP shards ``parameters``.

    Raises UsageError where the parameters lie on meshes of different sizes, or are split by tensor parallelism as well.
    """
    sizes = set()
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        if sum(not placement.is_replicate() for placement in parameter.placements) > 1:
            raise UsageError("a parameter is sharded along several mesh dimensions: tensor parallelism beside FSDP2")
        sizes.add(parameter.device_mesh.size())
    if len(sizes) > 1:
        raise UsageError(f"the parameters lie on meshes of different sizes ({sorted(sizes)})")
    return sizes.pop() if sizes else 1


def shard_ranks(parameter: Tensor) -> int:
    """How many ranks one copy of ``parameter`` is split over."""
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return next((mesh.size(i) for i, placement in enumerate(placements) if not placement.is_replicate()), 1)


def padded_shard_numel(parameter: Tensor) -> int:
    """Elements that FSDP2 sets aside for each rank's part of ``parameter``: the first dimension rounded up."""
    if parameter.numel() == 0:
        return 0
    assert isinstance(parameter, DTensor)
    dimension = next((int(p.dim) for p in parameter.placements if p.is_shard()), 0)  # type: ignore[attr-defined]  # Shard's
    size = parameter.shape[dimension]
    return -(-size // shard_ranks(parameter)) * (parameter.numel() // size)


def reduce_over_shards(values: Tensor, groups: ShardGroups, op: str = "sum") -> Tensor:
    """Reduce ``values`` in place over ``groups``: one all_reduce each. ``op`` is "sum" or "max"."""
    for group in groups:
        dist.all_reduce(values, op=_REDUCE_OPS[op], group=group)
    return values


def refuse_flat_parameter(parameter: Tensor, name: str) -> None:
    """Raise UsageError for a parameter that lies, in pieces or whole, in a flat buffer of FSDP1 or DeepSpeed ZeRO."""
    reason = "its layers' borders are lost in the flat buffer, so that layer-wise norms would be silently wrong"
    # FSDP1 marks what it flattens, also the views of use_orig_params=True, and its own buffers.
    if getattr(parameter, "_fsdp_flattened", False) or getattr(parameter, "_is_flat_param", False):
        raise UsageError(f"{name} is a flat parameter of FSDP1: {reason}; shard with fully_shard (FSDP2) instead")
    if hasattr(parameter, "ds_id"):
        raise UsageError(f"{name} is partitioned by DeepSpeed ZeRO: {reason}; shard with fully_shard (FSDP2) instead")


def total_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, 0-dim float32, right for any mixture of sharded and plain parameters.

    One all_reduce for each set of shard groups, none where nothing is sharded, no host synchronisation.
    """
    return _total_grad_norm(parameters).float()


def _total_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """In double precision."""
    with torch.no_grad():
        by_groups: dict[ShardGroups, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_groups.setdefault(shard_groups(parameter), []).append(local_gradient(parameter))
        sums = [reduce_over_shards(_square_sum(gradients), groups) for groups, gradients in by_groups.items()]
        if not sums:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([value.to(sums[0].device) for value in sums]).sum().sqrt()


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their total 2-norm is at most ``max_norm``; returns the norm before.

    Like ``torch.nn.utils.clip_grad_norm_``, which fails where some parameters are sharded and others are not.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = _total_grad_norm(parameters)  # float64 gradients lose nothing
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    with torch.no_grad():
        for parameter in parameters:
            assert parameter.grad is not None
            gradient = local(parameter.grad)
            gradient.mul_(factor.to(gradient.device))
    return norm.float()


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, 0-dim, in double precision."""
    norms = torch._foreach_norm(list(tensors), 2.0, dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    return torch.stack([norm.double() for norm in norms]).square().sum()
