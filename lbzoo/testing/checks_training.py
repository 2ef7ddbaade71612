"""The optimizer inside what people train with: loss scaling, accelerate, torch.compile, meta tensors, fused kernels."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

from lbzoo.optim import batch, fused_kernels
from lbzoo.testing.check import check, expect, skip
from lbzoo.testing.example import Example, backward, expect_close, expect_same, same, train, weights
from lbzoo.testing.subject import Subject


@check()
def grad_scaler_unscales(subject: Subject) -> None:
    """An optimizer that declares that it unscales fp16 gradients itself, and does not, steps on gradients that are
    thousands of times too large.
    """
    model, plain = Example(), Example()
    train(plain, subject.build(plain), range(3))
    optimizer, scaler = subject.build(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        scaled_step(model, optimizer, scaler, step)
    expect_close(weights(model), weights(plain), weights(Example()), "with GradScaler against without", tolerance=1e-5)


@check()
def grad_scaler_skips_overflow(subject: Subject) -> None:
    """An fp16 overflow is routine, and its step must be skipped: an optimizer that declares support for GradScaler and
    forgets found_inf writes infinities into weights and moments.
    """
    model = Example()
    optimizer, scaler = subject.build(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, optimizer, scaler, 0)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    scaled_step(model, optimizer, scaler, 1, overflow=True)
    expect_same(weights(model), before, "a step with an infinite gradient")
    after = optimizer.state_dict()
    for index, values in state["state"].items():
        for key, value in values.items():
            now = after["state"][index][key]
            unchanged = same(now, value) if isinstance(value, Tensor) else now == value
            expect(bool(unchanged), f"a step with an infinite gradient changes '{key}'")


def scaled_step(
    model: Example, optimizer: Optimizer, scaler: torch.amp.GradScaler, step: int, *, overflow: bool = False
) -> None:
    """A step the way mixed-precision loops make it; ``overflow`` puts an infinity into one gradient."""
    model.zero_grad()
    scaler.scale(model(step)).backward()
    gradient = model.get_parameter("layers.conv0.bias").grad
    if overflow and gradient is not None:
        gradient[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()


@check()
def accelerate(subject: Subject) -> None:
    """accelerate's prepare() wraps the optimizer, loads its empty state back into it and leaves out the steps inside a
    gradient accumulation: training must be what it is in a plain loop.
    """
    if importlib.util.find_spec("accelerate") is None:
        skip("accelerate is not installed")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state:
        skip("this process uses accelerate already")
    plain = Example()
    reference = subject.build(plain)
    for step in range(0, 6, 2):
        plain.zero_grad()
        ((plain(step) + plain(step + 1)) / 2).backward()
        reference.step()
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = Example()
        prepared, optimizer = accelerator.prepare(model, subject.build(model))
        expect(hasattr(optimizer, "step_was_skipped"), "accelerate does not take it for an optimizer")
        for step in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(step))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    expect_close(weights(model), weights(plain), weights(Example()), "under accelerate against a plain loop")


@check()
def meta_tensors(subject: Subject) -> None:
    """The memory of a model that fits no machine is planned by a step on meta tensors; so is its sharding."""
    model = Example().to("meta")
    optimizer = subject.build(model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            full_size = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
            expect(not full_size or value.is_meta, f"'{key}' of a meta parameter takes real memory")


@check(slow=True)
def torch_compile(subject: Subject) -> None:
    """Under torch.compile the Python of the step runs when it is traced: what it decides there (a counter, a first
    step) is decided once. The compiled step must be the eager one, and must not be compiled anew at every step.
    """
    model, eager = Example(), Example()
    train(eager, subject.build(eager), range(12))
    optimizer = subject.build(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    graphs = []  # compiled so far, a number a step
    try:
        for step in range(12):
            backward(model, step)
            compiled()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        torch._dynamo.reset()
    expect_close(weights(model), weights(eager), weights(Example()), "compiled against eager")
    expect(graphs[5] == graphs[-1], f"compiled anew at every step: {graphs[-1]} graphs after {len(graphs)} steps")


@check()
def fused_equals_plain(subject: Subject) -> None:
    """A fast path and a plain one drift apart with the first fix that only one of them gets; which one runs depends on
    the machine.
    """
    switches = [name for name in ("fused", "foreach") if subject.takes(name)]
    for options in ({}, {"weight_decay": 0.1}, {"momentum": 0.9}):
        if any(not subject.takes(name) for name in options):
            continue
        with plain_formulas() as can_fuse:
            plain = trained_with(subject, options | dict.fromkeys(switches, False))
        if can_fuse.called:
            chosen = trained_with(subject, options)
            expect_close(chosen, plain, weights(Example()), "fused kernels against plain formulas", tolerance=1e-5)
            with mock.patch.object(batch, "SMALL", -1):  # as tensors of more elements go
                chosen = trained_with(subject, options)
            expect_close(chosen, plain, weights(Example()), "tensor by tensor against plain formulas", tolerance=1e-5)
        elif not switches:
            skip("has one path only")
        for switch in switches:
            chosen = trained_with(subject, options | {name: name == switch for name in switches})
            what = f"{switch}=True against {switch}=False"
            expect_close(chosen, plain, weights(Example()), what, tolerance=1e-5)


@contextmanager
def plain_formulas() -> Iterator[mock.Mock]:
    """The zoo's optimizers without fused kernels, for which they have no option; ``called`` if one would use them."""
    with mock.patch.object(fused_kernels, "can_fuse", return_value=False) as can_fuse:
        yield can_fuse


def trained_with(subject: Subject, options: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after four steps."""
    model = Example()
    train(model, subject.build(model, **options), range(4))
    return weights(model)
