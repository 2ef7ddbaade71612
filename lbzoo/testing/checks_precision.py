"""bf16 and fp16 parameters: what the optimizer keeps of them, and how it computes with them."""

from __future__ import annotations

import copy

import torch
from torch.optim import Optimizer

from lbzoo.testing.check import CheckFailure, check, expect
from lbzoo.testing.example import Example, same, train, weights
from lbzoo.testing.subject import Subject

LOW = (torch.bfloat16, torch.float16)


@check()
def low_precision_state(subject: Subject) -> None:
    """A second moment in bf16 stops following the gradients: adding 0.001 of something to it is rounded away."""
    for dtype in LOW:
        model = Example(dtype=dtype)
        optimizer = subject.build(model)
        train(model, optimizer, range(1))
        expect_float32_state(optimizer, f"after a step on {dtype} parameters")


@check()
def low_precision_state_loaded(subject: Subject) -> None:
    """torch's own load_state_dict casts all state to the type of its parameter: unless the optimizer prevents it, a
    resumed bf16 run loses 16 bits of every moment and goes on in bf16.
    """
    for dtype in LOW:
        model, resumed = Example(dtype=dtype), Example(dtype=dtype)
        optimizer, loaded = subject.build(model), subject.build(resumed)
        train(model, optimizer, range(2))
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        saved, found = optimizer.state_dict()["state"], loaded.state_dict()["state"]
        for index, key in ((index, key) for index, state in saved.items() for key in state):
            before, after = saved[index][key], found[index][key]
            if isinstance(before, torch.Tensor):
                kept = before.dtype == after.dtype and same(before, after)
                expect(kept, f"loading turns '{key}' of {dtype} parameters from {before.dtype} into {after.dtype}")


def expect_float32_state(optimizer: Optimizer, when: str) -> None:
    """Fail if a floating-point tensor of the state is narrower than float32."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dtype in LOW:
                raise CheckFailure(f"'{key}' is {value.dtype} {when}")


@check()
def low_precision_range(subject: Subject) -> None:
    """fp16 ends at 65,504: the squares of gradients above 256, which loss scaling makes common, overflow in it, and the
    step becomes zero or NaN. Computed in float32 and rounded once, it is right.
    """
    for dtype in LOW:
        low, full = Example(dtype=dtype, scale=100.0), Example(dtype=dtype, scale=100.0).float()
        optimizers = [subject.build(model) for model in (low, full)]
        sizes = {name: tensor.abs() for name, tensor in weights(full).items()}
        for step in range(2):
            before = weights(full)
            for model, optimizer in zip((low, full), optimizers, strict=True):
                train(model, optimizer, [step])
            for name, tensor in weights(full).items():
                sizes[name] += tensor.abs() + (tensor - before[name]).abs()
        for name, expected in weights(full).items():
            # A few roundings, of each weight and of each step.
            off = (low.get_parameter(name).float() - expected).abs()
            near = bool((off <= 2 * torch.finfo(dtype).eps * sizes[name]).all())
            expect(near, f"{name} in {dtype} is off by {off.max().item():.1e} with gradients of hundreds")
