"""What each rank does. Rank r takes the r-th part of the batch, in ``micro_batches`` pieces one after another."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from brute_force import data, loss_of, make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lbzoo
from lbzoo.gsnr import GradientStats

Result = dict[str, Any]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def wrap(layout: str, model: nn.Module, precision: str = "32") -> nn.Module:
    """``model`` as it is trained in a layout; everything on the CPU."""
    ranks = dist.get_world_size()
    if layout.startswith("ddp"):
        return DistributedDataParallel(
            model,
            bucket_cap_mb=0.0005,
            gradient_as_bucket_view="view" in layout,
            find_unused_parameters="unused" in layout,
        )
    if layout.startswith("hsdp"):
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    whole_parameters = {model.scale, model.c.weight} if layout == "mixed" else set()
    if layout == "one group":
        return fully_shard(model, mesh=mesh)
    parts = [[model.a], [model.b, model.c]] if layout == "list" else [[model.a], [model.b], [model.c]]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole_parameters)
    return fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole_parameters)


def backward_passes(
    layout: str,
    model: nn.Module,
    micro_batches: int,
    used: int,
    *,
    no_sync: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[None]:
    """``used`` of the rank's micro-batches; the loss is divided by their number."""
    x, y = (tensor.chunk(dist.get_world_size())[dist.get_rank()].chunk(micro_batches) for tensor in data())
    for index in range(used):
        last = index == used - 1
        put_off(layout, model, not last)
        quiet = no_sync and not last and isinstance(model, DistributedDataParallel)
        with model.no_sync() if quiet else contextlib.nullcontext():
            (loss_of(model, x[index].to(dtype), y[index].to(dtype)) / used).backward()
        yield


def put_off(layout: str, model: nn.Module, later: bool) -> None:
    """ "hsdp late": one all_reduce over the replicas a step. "fsdp seldom": one reduction of any kind a step."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and layout == "hsdp late":
            module.set_requires_all_reduce(not later, recurse=False)
        if isinstance(module, FSDPModule) and layout == "fsdp seldom":
            module.set_requires_gradient_sync(not later, recurse=False)


def average_whole_gradients(layout: str, model: nn.Module) -> None:
    """What a loop has to do for parameters that fully_shard was told to ignore."""
    if layout == "mixed":
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(dist.get_world_size())


def collect(
    layout: str,
    name: str = "net",
    micro_batches: int = 1,
    used: int | None = None,
    options: Result | None = None,
    precision: str = "32",
    no_sync: bool = True,
    clip: float | None = None,
    spoil: str | None = None,
    windows: int = 3,
) -> Result:
    """Statistics of the last of some windows; DDP builds its buckets anew after the first."""
    warnings.simplefilter("ignore")
    model = wrap(layout, make_model(name).double() if precision == "64" else make_model(name), precision)
    stats = GradientStats(model, **(options or {}))
    for _ in range(windows):
        model.zero_grad()
        dtype = torch.float64 if precision == "64" else torch.float32
        for _ in backward_passes(layout, model, micro_batches, used or micro_batches, no_sync=no_sync, dtype=dtype):
            pass
        average_whole_gradients(layout, model)
        if clip is not None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(clip)
    if spoil is not None:
        gradient = model.get_parameter(spoil).grad
        assert isinstance(gradient, DTensor)
        gradient.to_local().fill_(torch.nan)
    per_layer = {name: value.item() for name, value in stats.mean_gsnr_per_layer().items()}
    return {
        "k": stats.num_gradients,
        "mean": {name: whole(value) for name, value in stats.mean().items()},
        "variance": {name: whole(value) for name, value in stats.variance().items()},
        "gsnr": {name: whole(value) for name, value in stats.gsnr().items()},
        "per_layer": per_layer,
        "noise_scale": stats.noise_scale() if stats.micro_batch_size else None,
        "dtypes": {str(parameter.grad.dtype) for parameter in model.parameters() if parameter.grad is not None},
    }


def count_collectives(layout: str, with_stats: bool, micro_batches: int) -> dict[str, list[int]]:
    """The elements sent in each reduction of the second step, by operation."""
    warnings.simplefilter("ignore")
    sent: dict[str, list[int]] = {}
    model = wrap(layout, make_model())
    if with_stats:
        GradientStats(model)
    for _ in range(2):
        sent.clear()
        model.zero_grad()
        with _recorded(sent):
            for _ in backward_passes(layout, model, micro_batches, micro_batches):
                pass
    return sent


@contextlib.contextmanager
def _recorded(sent: dict[str, list[int]]) -> Iterator[None]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operation = func._schema.name.split("::")[1]
            if "reduce" in operation and "c10d" in func._schema.name:
                tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
                sent.setdefault(operation, []).append(max(t.numel() for t in tensors))
            return func(*args, **(kwargs or {}))

    with Record():
        yield


def misuse(case: str) -> str:
    """The message of the UsageError that a mistake leads to."""
    warnings.simplefilter("ignore")
    model = make_model()
    try:
        if case == "bare":
            GradientStats(model)
        elif case == "inner":
            GradientStats(DistributedDataParallel(model).module)
        elif case == "groups":
            GradientStats(DistributedDataParallel(model), groups=3)
        elif case == "hook taken":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

            ddp = DistributedDataParallel(model)
            ddp.register_comm_hook(None, fp16_compress_hook)
            GradientStats(ddp)
        elif case == "never synchronised":
            ddp = DistributedDataParallel(model)
            stats = GradientStats(ddp)
            x, y = data()
            with ddp.no_sync():
                loss_of(ddp, x, y).backward()
            stats.variance()
        elif case == "partial pool":
            stats = GradientStats(wrap("fsdp", model), groups=4, micro_batches=4)
            for _ in backward_passes("fsdp", stats._model(), 4, 3):
                pass
            stats.variance()
        elif case == "fsdp1":
            from torch.distributed.fsdp import FullyShardedDataParallel

            GradientStats(FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")))
        elif case == "sharded otherwise":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            model.a.weight = nn.Parameter(distribute_tensor(model.a.weight, mesh, [Shard(0)]))
            GradientStats(model)
        elif case == "replicated":
            mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
            GradientStats(fully_shard(model, mesh=mesh))
        elif case == "fp16 reduction":
            policy = MixedPrecisionPolicy(param_dtype=torch.float16)
            sharded = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
            GradientStats(sharded)
            for _ in backward_passes("fsdp", sharded, 1, 1):
                pass
    except ValueError as error:
        return str(error)
    return ""


def attach_again(layout: str) -> tuple[bool, bool]:
    """(after detach() gradients are those of a fresh model, a second GradientStats sees what the first saw)."""
    warnings.simplefilter("ignore")
    model = wrap(layout, make_model())
    variances = []
    for _ in range(2):
        stats = GradientStats(model)
        model.zero_grad()
        for _ in backward_passes(layout, model, 2, 2):
            pass
        variances.append({name: whole(value) for name, value in stats.variance().items()})
        stats.detach()
        model.zero_grad()
        for _ in backward_passes(layout, model, 2, 2):
            pass
    bare = wrap(layout, make_model())
    for _ in backward_passes(layout, bare, 2, 2):
        pass
    pairs = zip(model.parameters(), bare.parameters(), strict=True)
    same = all(torch.allclose(whole(a.grad), whole(b.grad), rtol=1e-6) for a, b in pairs)
    return same, all(torch.equal(variances[0][name], variances[1][name]) for name in variances[0])


def train_vr(layout: str, base: str, micro_batches: int, steps: int, options: Result) -> Result:
    """Weights after some steps of ``vr_<base>``, and the collectives of the last ``step()``."""
    warnings.simplefilter("ignore")
    model = wrap(layout, make_model())
    optimizer = lbzoo.create_optimizer(model, f"vr_{base}", **options)
    optimizer.attach_stats(GradientStats(model))
    sent: dict[str, list[int]] = {}
    for _ in range(steps):
        for _ in backward_passes(layout, model, micro_batches, micro_batches):
            pass
        average_whole_gradients(layout, model)
        sent.clear()
        with _recorded(sent):
            optimizer.step()
        optimizer.zero_grad()
    named = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    return {"weights": named, "collectives": sum(map(len, sent.values()))}


def resume_vr(folder: str, save: bool, steps: int) -> Result:
    """Save after some steps under FSDP2, or load and go on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    warnings.simplefilter("ignore")
    model = wrap("fsdp", make_model())
    optimizer = lbzoo.create_optimizer(model, "vr_lamb", lr=0.02)
    optimizer.attach_stats(GradientStats(model))
    if not save:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for _ in range(steps):
        for _ in backward_passes("fsdp", model, 4 // dist.get_world_size(), 4 // dist.get_world_size()):
            pass
        optimizer.step()
        optimizer.zero_grad()
    if save:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return {name: whole(p) for name, p in model.named_parameters()}
