"""What each rank does in the tests of sharded models; importable by worker processes."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from fit_jobs import fit_here
from lightning.pytorch import Callback
from parity_tasks import LayerNormNet, Measured
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lbzoo.engines import sharded_model
from lbzoo.engines.activation_checkpointing import checkpoint_activations
from lbzoo.engines.launch import World
from lbzoo.engines.sharded_model import free_gathered_weights, shard
from lbzoo.recipe.schema import FsdpSettings, TrainerSettings
from lbzoo.tasks.image_classification import ImageClassification


class Tied(Measured):
    """Two layers that share a weight."""

    fsdp_layers = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.model[1].weight = self.model[0].weight


class WithScalar(Measured):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(()))


class Collectives(TorchDispatchMode):
    """Counts collectives by kind. CommDebugMode, which also keeps the modules, cannot follow several micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            name = func.__name__
            self.counts[next((kind for kind in ("gather", "scatter", "allreduce") if kind in name), name)] += 1
        return func(*args, **(kwargs or {}))


class CountCollectives(Callback):
    """Counts the collectives of optimizer step 3, up to its end and what the callbacks before this one do."""

    counted: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        self._collectives: Collectives | None = None

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 2 and self._collectives is None:
            self._collectives = Collectives()
            self._collectives.__enter__()

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3 and self._collectives is not None:
            self._collectives.__exit__(None, None, None)
            CountCollectives.counted = dict(self._collectives.counts)
            self._collectives = None


def settings(**options: Any) -> TrainerSettings:
    fsdp = {key: options.pop(key) for key in ("shard_size", "layers", "reshard_after_forward") if key in options}
    return TrainerSettings(strategy="fsdp", fsdp=FsdpSettings(**fsdp), **options)


def world() -> World:
    size, rank = dist.get_world_size(), dist.get_rank()
    return World("cpu", size, 1, rank, rank, "torchrun")


def layout(options: dict[str, Any]) -> dict[str, Any]:
    """How a network comes out of ``shard``."""
    task = LayerNormNet(num_classes=3)
    before = [name for name, _ in task.named_parameters()]
    for _ in range(2):  # once is enough
        shard(task, world(), settings(**options))
    parameters = dict(task.named_parameters())
    assert list(parameters) == before
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    one = parameters["model.1.up.weight"]
    return {
        "units": [name for name, module in task.named_modules() if isinstance(module, FSDPModule)],
        "mesh": tuple(one.device_mesh.shape),
        "placements": [str(placement) for placement in one.placements],
        "dtype": one.dtype,
        "shard": tuple(one.to_local().shape),
    }


def error_of(kind: str, options: dict[str, Any]) -> str:
    tasks: dict[str, Any] = {"net": lambda: LayerNormNet(num_classes=3), "tied": Tied, "scalar": WithScalar,
                             "l2": lambda: classifier(l2_regularization=0.1)}  # fmt: skip
    try:
        shard(tasks[kind](), world(), settings(**options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def error_of_a_policy_that_came_to_nothing(skipped: str) -> str:
    """``shard`` where torch's fully_shard leaves modules of a class as they are."""
    original = sharded_model.fully_shard

    def forgetful(module: nn.Module, **options: Any) -> Any:
        return module if type(module).__name__ == skipped else original(module, **options)

    sharded_model.fully_shard = forgetful  # type: ignore[assignment]
    try:
        return error_of("net", {})
    finally:
        sharded_model.fully_shard = original


def classifier(**options: Any) -> ImageClassification:
    torch.manual_seed(1)
    return ImageClassification(model="cifar_resnet20", num_classes=4, input_shape=(3, 8, 8), **options)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def gradients(precision: str, activation_checkpointing: bool, sharded: bool) -> dict[str, Tensor]:
    """The gradients and running statistics of a classifier with an L2 term, in whole tensors."""
    trainer = settings(precision=precision, activation_checkpointing=activation_checkpointing)
    task = classifier(l2_regularization=0.01)
    checkpoint_activations(task, trainer)
    if sharded:
        shard(task, world(), trainer)
    elif precision == "64-true":
        task.double()
    half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    batch = [
        tensor.double() if precision == "64-true" and tensor.is_floating_point() else tensor for tensor in images()
    ]
    with half:
        loss = task.training_step((batch[0], batch[1]), 0)
    loss.backward()
    whole = {name: parameter.grad for name, parameter in task.named_parameters()}
    found = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in whole.items()}
    return {**found, **{name: buffer for name, buffer in task.named_buffers() if "pixel" not in name}}


def weights_after_a_validation() -> list[bool]:
    """Whether the root's weights are those that are trained: after a forward pass, and after free_gathered_weights."""
    task = LayerNormNet(num_classes=3)
    shard(task, world(), settings())
    trained = {id(parameter) for parameter in task.parameters()}
    with torch.no_grad():
        task.validation_step((torch.randn(4, 10), torch.zeros(4, dtype=torch.long)), 0)
    found = []
    for _ in range(2):
        found.append({id(parameter) for parameter in task.parameters()} == trained)
        free_gathered_weights(task)
    return found


def collectives_of_a_run(recipe: Path, overrides: list[str], runs: Path) -> dict[str, int]:
    fit_here(recipe, overrides, runs)
    return CountCollectives.counted


def collectives_of_a_bare_loop(micro_batches: int) -> dict[str, int]:
    """The same model and units in a loop of torch's own, with SGD."""
    task = LayerNormNet(num_classes=3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (task.model[1], task.model[2], task):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(task, "training_step")
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    batch = torch.randn(4, 10), torch.zeros(4, dtype=torch.long)
    for _ in range(2):
        with Collectives() as collectives:
            for index in range(micro_batches):
                task.set_requires_gradient_sync(index == micro_batches - 1)
                (task.training_step(batch, index) / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
    return dict(collectives.counts)
