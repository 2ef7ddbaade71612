"""FSDP2 and distributed checkpoints, on two and three gloo processes.

The model of :mod:`lbzoo.testing.example` has the same gradients on every rank, so that a sharded training must be the
training of one process. Over two and three ranks its parameters fall into even, uneven and empty shards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from lbzoo.testing.check import CheckFailure, check, expect, skip
from lbzoo.testing.checks_statistics import tracked_step
from lbzoo.testing.example import Example, backward, expect_close, train, weights
from lbzoo.testing.processes import JobError, shared_processes
from lbzoo.testing.subject import Subject

T = TypeVar("T")
Options = Mapping[str, Any]


def on_ranks(subject: Subject, ranks: int, job: Callable[..., T], *args: Any) -> T:
    """What rank 0 returns from ``job(reference, options, *args)``, run on so many ranks."""
    if subject.reference is None:
        skip("another process cannot import it: name it as module:Class or file.py:Class")
    try:
        return shared_processes().run(ranks, job, subject.reference, dict(subject.options), *args)[0]
    except JobError as error:
        raise CheckFailure(str(error)) from error


def sharded_example(*, copies: int = 1, replicated: tuple[str, ...] = ()) -> Example:
    """The example under fully_shard, layer by layer, ``replicated`` parameters left out; a plain module on one rank."""
    model = Example(copies=copies)
    ranks = dist.get_world_size()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        ignored: set[nn.Parameter] = {model.get_parameter(name) for name in replicated}
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh, ignored_params=ignored & set(layer.parameters()))
        fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


@check()
def fsdp2_equals_one_process(subject: Subject) -> None:
    """Under FSDP2 a norm taken of the local shard is the norm of a part of the layer: every rank then scales its shard
    by a trust ratio of its own, and the run is worse for no visible reason.
    """
    expect_one_process(subject, ())


@check()
def fsdp2_with_replicated_parameters(subject: Subject) -> None:
    """Parameters that FSDP2 is told to ignore are whole on every rank, beside the shards of the others: adding up their
    norms as well counts them once a rank, and kernels over mixed lists refuse them.
    """
    expect_one_process(subject, ("layers.conv0.bias", "layers.head0.weight"))


def expect_one_process(subject: Subject, replicated: tuple[str, ...]) -> None:
    """Fail unless five steps on two and on three ranks are the five steps of one process."""
    plain = Example()
    train(plain, subject.build(plain), range(5))
    for ranks in (2, 3):
        actual = on_ranks(subject, ranks, train_sharded, replicated)
        expect_close(actual, weights(plain), weights(Example()), f"sharded over {ranks} ranks")


def train_sharded(reference: str, options: Options, replicated: tuple[str, ...]) -> dict[str, Tensor]:
    model = sharded_example(replicated=replicated)
    train(model, Subject.resolve(reference, options).build(model), range(5))
    return weights(model)


@check()
def collectives_do_not_grow_with_layers(subject: Subject) -> None:
    """A collective for every layer costs its latency hundreds of times a step: one for the whole model is enough."""
    few, many = (on_ranks(subject, 2, count_collectives, copies) for copies in (1, 3))
    expect(few == many, f"{few} collectives a step for 5 tensors, {many} for 15")


def count_collectives(reference: str, options: Options, copies: int) -> int:
    model = sharded_example(copies=copies)
    optimizer = Subject.resolve(reference, options).build(model)
    train(model, optimizer, range(1))
    backward(model, 1)
    with CommDebugMode() as collectives:
        optimizer.step()
    return int(collectives.get_total_counts())


@check()
def checkpoint_from_2_ranks_to_1(subject: Subject) -> None:
    """A model trained on many devices is fine-tuned on one: its checkpoint must hold whole moments, by name."""
    expect_resharding(subject, 1)


@check()
def checkpoint_from_2_ranks_to_3(subject: Subject) -> None:
    """After a node is lost or won, a run goes on with other shards: moments that are plain local tensors cannot be cut
    anew, and land at the wrong rows or nowhere.
    """
    expect_resharding(subject, 3)


def expect_resharding(subject: Subject, ranks: int) -> None:
    """Fail unless a run saved on two ranks and loaded on ``ranks`` is the run that was not interrupted."""
    with tempfile.TemporaryDirectory(prefix="lbzoo-checkpoint-") as folder:
        expected = on_ranks(subject, 2, save_and_continue, folder)
        actual = on_ranks(subject, ranks, load_and_continue, folder)
    expect_close(actual, expected, weights(Example()), f"saved on 2 ranks, loaded on {ranks}")


def save_and_continue(reference: str, options: Options, folder: str) -> dict[str, Tensor]:
    model = sharded_example()
    optimizer = Subject.resolve(reference, options).build(model)
    train(model, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))
    return weights(model)


def load_and_continue(reference: str, options: Options, folder: str) -> dict[str, Tensor]:
    model = sharded_example()
    optimizer = Subject.resolve(reference, options).build(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, range(3, 6))
    return weights(model)


@check()
def layer_stats_sharded(subject: Subject) -> None:
    """Statistics of one rank's shards look plausible, and are those of an eighth of each layer on eight devices."""
    model = Example()
    stats = tracked_step(subject.build(model), model, 0)
    names, values = on_ranks(subject, 2, sharded_statistics)
    expect(names == stats.names, f"the layers are {names} over two ranks and {stats.names} on one")
    for key, expected in stats.values.items():
        expect(key in values, f"'{key}' is missing over two ranks")
        expect_close({key: values[key]}, {key: expected}, {key: expected * 0}, "over two ranks")


def sharded_statistics(reference: str, options: Options) -> tuple[list[str], dict[str, Tensor]]:
    model = sharded_example()
    stats = tracked_step(Subject.resolve(reference, options).build(model), model, 0)
    return stats.names, dict(stats.values)
