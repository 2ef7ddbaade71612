"""One step, as torch defines it: closures, gradients that are missing, zero, NaN, sparse or oddly laid out."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lbzoo.testing.check import CheckFailure, check, expect
from lbzoo.testing.example import (
    Example,
    backward,
    expect_close,
    expect_finite,
    expect_moved,
    expect_same,
    train,
    weights,
)
from lbzoo.testing.subject import Subject


@check()
def step_without_closure(subject: Subject) -> None:
    """Training loops, schedulers and wrappers call step() with no argument, and expect every weight to move."""
    model = Example()
    start = weights(model)
    optimizer = subject.build(model)
    backward(model, 0)
    returned = optimizer.step()
    expect(returned is None, f"step() returned {returned!r}, not None")
    expect_moved(model, start, "after one step")
    expect_finite(model, "after one step")


@check()
def closure(subject: Subject) -> None:
    """Lightning passes the whole forward and backward pass as the closure: an optimizer that ignores it never trains,
    one that runs it late uses the gradients of the step before, one that drops its value logs no loss.
    """
    plain, model = Example(), Example()
    train(plain, subject.build(plain), range(2))
    optimizer = subject.build(model)
    for step in range(2):
        step_with_closure(model, optimizer, step)
    expect_same(weights(model), weights(plain), "with a closure against without")


def step_with_closure(model: Example, optimizer: Optimizer, step: int) -> None:
    """One step, the gradients of which appear in the closure only."""
    gradients_enabled: list[bool] = []

    def run_model() -> Tensor:
        gradients_enabled.append(torch.is_grad_enabled())
        with torch.enable_grad():
            backward(model, step)
        return torch.tensor(0.5)

    model.zero_grad()
    loss = cast("Tensor | float | None", optimizer.step(run_model))  # type: ignore[arg-type]  # torch wants a float
    expect(bool(gradients_enabled), "the closure was not run")
    expect(len(gradients_enabled) == 1, f"the closure was run {len(gradients_enabled)} times in a step")
    expect(gradients_enabled[0], "the closure was run with gradients disabled: its backward() would fail")
    expect(loss is not None and float(loss) == 0.5, f"step(closure) returned {loss!r}, not the closure's value")


@check()
def gradients_untouched(subject: Subject) -> None:
    """Monitors, gradient statistics and gradient accumulation read p.grad after the step."""
    model = Example()
    optimizer = subject.build(model)
    for step in range(2):
        backward(model, step)
        before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, parameter in model.named_parameters():
            gradient, values = before[name]
            expect(parameter.grad is gradient, f"step() replaced the gradient of {name}")
            expect(torch.equal(gradient, values), f"step() wrote to the gradient of {name}")


@check()
def none_gradients(subject: Subject) -> None:
    """Frozen layers and unused branches have no gradient: they must stay as they are, momentum and decay included."""
    idle = {"layers.conv0.weight": (1, 2), "layers.head0.bias": (0, 1, 2)}  # parameter: steps without a gradient
    model = Example()
    optimizer = subject.build(model)
    for step in range(3):
        backward(model, step)
        for name, steps in idle.items():
            if step in steps:
                model.get_parameter(name).grad = None
        before = weights(model)
        optimizer.step()
        expect_finite(model, "with missing gradients")
        for name, now in weights(model).items():
            same = torch.equal(now, before[name])
            if step in idle.get(name, ()):
                expect(same, f"{name} had no gradient in step {step + 1} and moved all the same")
            else:
                expect(not same, f"{name} did not move in step {step + 1}, in which other parameters had no gradient")


@check()
def zero_gradients(subject: Subject) -> None:
    """Padding rows, dead units and the first step of a zero-initialised branch give gradients that are all zero:
    dividing by their norm makes the weights NaN for good.
    """
    model = Example()
    optimizer = subject.build(model)
    for step in range(3):
        backward(model, step)
        if step < 2:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        start = weights(model)
        optimizer.step()
        expect_finite(model, f"after {min(step + 1, 2)} steps of zero gradients")
    expect_moved(model, start, "in the first step with a gradient after two without")


@check()
def zero_weights(subject: Subject) -> None:
    """Biases and the last layer of a residual branch start at zero: a trust ratio of |x| = 0 would keep them there."""
    model = Example()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    start = weights(model)
    train(model, subject.build(model), range(3))  # of an odd number: steps of equal size may lead back to zero
    expect_finite(model, "from weights of zero")
    expect_moved(model, start, "from weights of zero")


@check()
def nan_stays_in_its_layer(subject: Subject) -> None:
    """One layer's NaN must not spread through a norm or a buffer: whoever looks for its origin finds it everywhere."""
    clean, model = Example(), Example()
    train(clean, subject.build(clean), range(3))
    train_with_nan(subject, model, "layers.conv0.weight")
    after, expected = weights(model), weights(clean)
    for name in after:
        if name != "layers.conv0.weight" and not torch.equal(after[name], expected[name]):
            raise CheckFailure(f"a NaN in the gradient of layers.conv0.weight changed {name}")


@check()
def nan_shows(subject: Subject) -> None:
    """A NaN that is silently replaced leaves a run that trains on garbage and never says so."""
    model = Example()
    train_with_nan(subject, model, "layers.conv0.weight")
    broken = model.get_parameter("layers.conv0.weight")
    expect(
        not bool(broken.isfinite().all()), "a NaN in the gradient of layers.conv0.weight left no trace in the weight"
    )


def train_with_nan(subject: Subject, model: Example, name: str) -> None:
    """Three steps, with one NaN in the gradient of one parameter at the second."""
    optimizer = subject.build(model)
    for step in range(3):
        backward(model, step)
        gradient = model.get_parameter(name).grad
        if step == 1 and gradient is not None:
            gradient.view(-1)[0] = torch.nan
        optimizer.step()


@check()
def scalar_parameters(subject: Subject) -> None:
    """A logit scale has no dimension: an optimizer that indexes or flattens shapes fails on it, and only on it."""
    scalar, vector = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.7]))
    optimizers = [subject.build([{"params": [parameter]}]) for parameter in (scalar, vector)]
    for step in range(3):
        for parameter, optimizer in zip((scalar, vector), optimizers, strict=True):
            parameter.grad = torch.full_like(parameter, 0.3 - 0.4 * step)
            optimizer.step()
    expect(scalar.shape == (), f"a 0-dim parameter came out with shape {tuple(scalar.shape)}")
    expect(bool(scalar.isfinite()), "a 0-dim parameter became infinite or NaN")
    named = ({"x": scalar.detach().reshape(1)}, {"x": vector.detach()}, {"x": torch.tensor([0.7])})
    expect_close(*named, "0-dim against one element", tolerance=1e-5)


@check()
def sparse_gradients(subject: Subject) -> None:
    """nn.Embedding(sparse=True) gives sparse gradients: an optimizer steps on them as on dense ones, or says that it
    does not take them. Anything else is a crash deep in a kernel, or a wrong step.
    """
    dense, sparse = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(5, 3))
    dense.grad = torch.zeros(5, 3)
    dense.grad[2] = 0.5
    sparse.grad = dense.grad.to_sparse(1)
    subject.build([{"params": [dense]}]).step()
    try:
        subject.build([{"params": [sparse]}]).step()
    except Exception as error:
        told = "sparse" in str(error).lower() and "backend" not in str(
            error
        )  # torch's own message names the SparseCPU backend
        expect(told, f"no clear refusal of sparse gradients, but {type(error).__name__}: {str(error).splitlines()[0]}")
        expect(bool((sparse == 1).all()), "sparse gradients were refused after the weights had changed")
    else:
        expect(torch.equal(sparse, dense), "a step on sparse gradients is not the step on the same dense ones")


@check()
def memory_layouts(subject: Subject) -> None:
    """channels_last models and tied or transposed weights have strides of their own, and gradients with others:
    kernels that walk storage in order then pair each weight with the gradient of another one, and nothing fails.
    """
    shape = (4, 3, 2, 2)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(step + 1)) for step in range(3)]
    contiguous, channels_last = torch.contiguous_format, torch.channels_last

    def trained(weight_format: torch.memory_format, gradient_format: torch.memory_format) -> dict[str, Tensor]:
        parameter = nn.Parameter(start.clone(memory_format=weight_format))
        optimizer = subject.build([{"params": [parameter]}])
        for gradient in gradients:
            parameter.grad = gradient.clone(memory_format=gradient_format)
            optimizer.step()
        return {"weight": parameter.detach().contiguous()}

    expected = trained(contiguous, contiguous)
    for weight_format, gradient_format, what in (
        (channels_last, channels_last, "weight and gradient channels_last"),
        (channels_last, contiguous, "weight channels_last, gradient contiguous"),
        (contiguous, channels_last, "weight contiguous, gradient channels_last"),
    ):
        expect_close(trained(weight_format, gradient_format), expected, {"weight": start}, what)
