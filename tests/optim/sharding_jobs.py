"""What each rank does in the tests of sharded steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lbzoo.optim import create_optimizer
from lbzoo.sharding import clip_grad_norm_, total_grad_norm

GROUPS = [{"match": "*.bias", "weight_decay": 0.0}, {"match": "last.*", "lr_scale": 0.5}]
STEPS = 5


class Net(nn.Module):
    """Rows that divide and rows that do not, a layer of one row, one-element and (at the end) unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.middle = nn.Linear(16, 7)
        self.last = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(torch.relu(self.norm(self.first(x)))))
        return self.last(hidden) * self.scale


def make_model() -> Net:
    torch.manual_seed(0)
    return Net()


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randn(12, 1, generator=generator)


def shard(model: Net, layout: str) -> None:
    """ "fsdp": over all ranks. "hsdp": 2 replicas of 2 shards. "mixed": some layers sharded, the rest replicated."""
    world_size = dist.get_world_size()
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    replicated = [model.last.weight, model.last.bias, model.scale] if layout == "mixed" else []
    for layer in (model.first, model.middle):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(replicated))
    for param in replicated:
        param.register_post_accumulate_grad_hook(average_gradient)


def average_gradient(param: Tensor) -> None:
    assert param.grad is not None
    dist.all_reduce(param.grad)
    param.grad.div_(dist.get_world_size())


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    ((model(x) - y) ** 2).mean().backward()


def train(layout: str | None, name: str, options: Mapping[str, Any], groups: bool = False) -> dict[str, Any]:
    """STEPS steps on this rank's part of the data; without a layout on all of it, in one process."""
    model = make_model()
    x, y = make_data()
    if layout is not None:
        shard(model, layout)
        x, y = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in (x, y))
    optimizer = create_optimizer(model, name, param_rules=GROUPS if groups else (), **options)
    counts = {}
    for step in range(1, STEPS + 1):
        backward(model, x, y)
        optimizer.track_layer_stats = step == STEPS
        with CommDebugMode() as collectives:
            optimizer.step()
        counts[step] = collectives.get_total_counts()
    stats = optimizer.layer_stats()
    return {
        "params": full_tensors(model),
        "stats": (stats.names, stats.values),
        "collectives": counts[STEPS - 1],
        "collectives_with_stats": counts[STEPS],
    }


def full_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param) for name, param in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save(folder: str, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Three steps, a checkpoint, three steps."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = trained(name, options, steps=3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    take_steps(model, optimizer, 3)
    return full_tensors(model)


def load(folder: str, name: str, options: Mapping[str, Any], sharded: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The checkpoint into a fresh optimizer, three steps; and the types of a parameter's state."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = trained(name, options, steps=0, sharded=sharded)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    take_steps(model, optimizer, 3)
    kinds = sorted(f"{key}:{type(value).__name__}" for key, value in optimizer.state[model.first.weight].items())
    return full_tensors(model), kinds


def trained(name: str, options: Mapping[str, Any], steps: int, sharded: bool = True) -> tuple[Net, Any]:
    model = make_model()
    model.unused.requires_grad_(False)  # torch's checkpoints expect state of every parameter that could be trained
    if sharded:
        shard(model, "fsdp")
    optimizer = create_optimizer(model, name, param_rules=GROUPS, **options)
    take_steps(model, optimizer, steps)
    return model, optimizer


def take_steps(model: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = make_data()
    for _ in range(steps):
        backward(model, x, y)  # the same data on all ranks: any number of them has the same mean gradient
        optimizer.step()


def clip(layout: str | None, max_norm: float) -> tuple[Tensor, Tensor, dict[str, Tensor], int]:
    model = make_model()
    if layout is not None:
        shard(model, layout)
    backward(model, *make_data())
    with CommDebugMode() as collectives:
        before = total_grad_norm(model.parameters())
    returned = clip_grad_norm_(model.parameters(), max_norm)
    assert torch.equal(before, returned)
    gradients = {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}
    return before, total_grad_norm(model.parameters()), gradients, collectives.get_total_counts()


def missing_gradients(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Two groups; rank 0 alone has a gradient for the norm, which makes a group of its own that others lack."""
    model = make_model()
    shard(model, "fsdp")
    optimizer = create_optimizer(model, name, param_rules=[{"match": "norm.*", "eps": 1e-5}], **options)
    backward(model, *make_data())
    if dist.get_rank() > 0:
        model.norm.weight.grad = model.norm.bias.grad = None
    optimizer.step()
    assert all(param in optimizer.state or param.grad is None for param in model.parameters())
    assert len(optimizer.state) == sum(param.grad is not None for param in model.parameters())
    return {name: param.to_local().detach().clone() for name, param in model.named_parameters()}


def flat_parameters(name: str, use_orig_params: bool) -> str:
    """The message with which an FSDP1 model is refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    try:
        create_optimizer(model, name)
    except ValueError as error:
        return str(error)
    return ""
