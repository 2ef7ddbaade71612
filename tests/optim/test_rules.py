"""Every rule and option against the double-precision reference, over 50 steps with a save and a load in the middle."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from reference import REFERENCES

from lbzoo.errors import UsageError
from lbzoo.optim import (
    adam_moments,
    batch,
    by_tensor,
    create_optimizer,
    elementwise,
    fused_kernels,
    lans_compiled,
    layerwise,
    momentum,
)

ADAM = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02}
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.02}
NOVOGRAD = {"betas": (0.95, 0.5), "eps": 1e-8, "weight_decay": 0.02}
LARS = {**MOMENTUM, "trust_coefficient": 0.02}

CASES = [
    ("lamb", ADAM),
    ("lamb", {**ADAM, "weight_decay": 0.0}),
    ("lamb", {**ADAM, "betas": (0.0, 0.0)}),
    ("lamb", {**ADAM, "bias_correction": False}),
    ("lamb", {**ADAM, "nesterov": "first", "bias_correction": False}),
    ("lamb", {**ADAM, "nesterov": "both"}),
    ("lamb", {**ADAM, "norm_order": 1}),
    ("lamb", {**ADAM, "norm_order": math.inf}),
    ("lamb", {**ADAM, "weight_norm_range": (0.5, 2.0)}),
    ("lamb", {**ADAM, "adapt": False}),
    ("lamb", {**ADAM, "adapt": False, "nesterov": "first"}),
    ("nlamb", ADAM),
    ("nnlamb", {**ADAM, "bias_correction": False}),
    ("lans", ADAM),
    ("lans", {**ADAM, "normalize_grad": False}),
    ("lans", {**ADAM, "norm_eps": 0.1}),
    ("lans", {**ADAM, "weight_norm_range": (0.5, 2.0)}),
    ("lans", {**ADAM, "adapt": False}),
    ("bnadamw", ADAM),
    ("bnadamw", {**ADAM, "norm_eps": 0.1}),
    ("lars", LARS),
    ("lars", {**LARS, "momentum": 0.0, "weight_decay": 0.0}),
    ("lars", {**LARS, "lr_in_momentum": False}),
    ("lars", {**LARS, "nesterov": True}),
    ("lars", {**LARS, "nesterov": True, "lr_in_momentum": False}),
    ("lars", {**LARS, "clip": True}),
    ("lars", {**LARS, "clip": True, "lr_in_momentum": False}),
    ("lars", {**LARS, "adapt": False}),
    ("lars2020", MOMENTUM),
    ("lars2020", {**MOMENTUM, "weight_norm_range": (0.5, 2.0)}),
    ("lars2020", {**MOMENTUM, "adapt": False}),
    ("novograd", NOVOGRAD),
    ("novograd", {**NOVOGRAD, "amsgrad": True}),
    ("novograd", {**NOVOGRAD, "ema": True}),
    ("novograd", {**NOVOGRAD, "decoupled": True}),
    ("novograd", {**NOVOGRAD, "eps_in_root": True, "eps": 1e-3}),
    ("novograd", {**NOVOGRAD, "betas": (0.95, 0.0)}),
    ("novograd", {**NOVOGRAD, "amsgrad": True, "ema": True, "decoupled": True, "eps": 0.0}),
    ("larc_momentum", {**MOMENTUM, "trust_coefficient": 0.02}),
    ("larc_adamw", {**ADAM, "trust_coefficient": 0.02}),
    ("larc_lamb", {**ADAM, "trust_coefficient": 0.02}),
]
IDS = [f"{name}-{'-'.join(f'{key}={value}' for key, value in options.items())}" for name, options in CASES]

SHAPES = [(13, 7), (4, 3, 2, 2), (6,), (1,), (), (5, 0)]
STEPS = 50


def learning_rate(step: int) -> float:
    """Warmup and decay: the place of the learning rate, in the buffer or outside, must show."""
    return 0.05 * min(step / 10, 1 - step / (STEPS + 10))


def make_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    params.append(torch.nn.Parameter(torch.zeros(4, dtype=dtype)))  # a norm of zero at the first step
    params.append(torch.nn.Parameter(torch.randn(3, 2, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)))
    return params


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Noise and a pull to zero; gradients of zero and None at times, on different tensors."""
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(params):
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        param.grad = (noise + 0.3 * param.detach()) * 10.0 ** (index % 3 - 1)
        if (step, index) in {(1, 2), (1, 4), (7, 0), (8, 0)}:
            param.grad = torch.zeros_like(param)
        if (step, index) in {(1, 1), (20, 3)}:
            param.grad = None


def run_both(name: str, options: dict, dtype: torch.dtype) -> float:
    """The largest error of a tensor after STEPS steps, in the 2-norm, relative to the largest norm that it had.

    (The momentum of some rules takes a tensor of one element through zero, where its own norm says nothing.)
    """
    params = make_params(dtype)
    optimizer = create_optimizer(params, name, lr=0.1, **options)
    expected = [param.detach().double().numpy().copy() for param in params]
    states: list[dict] = [{} for _ in params]
    largest = [np.linalg.norm(np.ravel(array)) for array in expected]
    for step in range(1, STEPS + 1):
        if step == STEPS // 2:
            optimizer = saved_and_loaded(optimizer, params, name, options)
        set_gradients(params, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for index, param in enumerate(params):
            if param.grad is not None:
                gradient = param.grad.double().numpy()
                expected[index] = REFERENCES[name](
                    expected[index], gradient, states[index], lr=learning_rate(step), **options
                )
                largest[index] = max(largest[index], np.linalg.norm(np.ravel(expected[index])))
        optimizer.step()
    errors = [
        np.linalg.norm(np.ravel(param.detach().double().numpy() - array)) / size
        for param, array, size in zip(params, expected, largest, strict=True)
        if param.numel()
    ]
    return float(max(errors))


def saved_and_loaded(optimizer, params, name, options):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = create_optimizer(params, name, lr=0.7, **options)
    loaded.load_state_dict(torch.load(file))
    return loaded


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_equals_the_reference(name, options):
    assert run_both(name, options, torch.float64) < 1e-12
    assert run_both(name, options, torch.float32) < 1e-6


@pytest.mark.parametrize("small", [-1, 1 << 15])
@pytest.mark.parametrize("name", ["lamb", "lans", "bnadamw", "lars", "novograd"])
def test_equals_the_reference_without_fused_kernels(name, small, monkeypatch):
    monkeypatch.setattr(batch, "SMALL", small)
    assert fused_kernels.fused_kernels_work("cpu"), "this torch lacks the kernels that the CPU step is built on"
    monkeypatch.setattr(fused_kernels, "fused_kernels_work", lambda device: False)
    options = dict(CASES)[name] if name not in ("lamb", "lans") else ADAM
    assert run_both(name, options, torch.float64) < 1e-12
    assert run_both(name, options, torch.float32) < 1e-6


BY_TENSOR = [(name, options) for name, options in CASES if name in ("lamb", "lans", "lars", "novograd")]


@pytest.mark.parametrize(("name", "options"), BY_TENSOR, ids=[IDS[CASES.index(case)] for case in BY_TENSOR])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_equals_the_reference_by_tensor(name, options, piece, monkeypatch):
    monkeypatch.setattr(batch, "SMALL", -1)
    monkeypatch.setattr(elementwise, "PIECE", piece)
    seen = by_tensor_calls(monkeypatch)
    assert run_both(name, options, torch.float64) < 1e-12
    assert run_both(name, options, torch.float32) < 1e-6
    assert bool(seen) == has_a_tensor_step(name, options)


def by_tensor_calls(monkeypatch) -> list[int]:
    """Filled with the numbers of tensors that go by tensor."""
    seen: list[int] = []

    def counted(*arguments):
        views, flat, rest = by_tensor.split_flat(*arguments)
        seen.append(len(views))
        return views, flat, rest

    monkeypatch.setattr(layerwise, "split_flat", counted)
    return seen


def has_a_tensor_step(name: str, options: dict) -> bool:
    momentum = options.get("betas", (0.9,))[0] if name == "novograd" else options.get("momentum", 0.9)
    return not options.get("nesterov") and options.get("norm_order", 2.0) == 2.0 and momentum > 0


@pytest.mark.parametrize("name", ["lamb", "lans", "bnadamw", "lars", "lars2020", "novograd", "larc_lamb"])
def test_equals_the_reference_when_tensors_are_cut_into_pieces(name, monkeypatch):
    """The same with pieces of 16 elements, so that tensors are cut, also those in another memory layout."""
    monkeypatch.setattr(elementwise, "PIECE", 16)
    options = next(options for case, options in CASES if case == name)
    assert run_both(name, options, torch.float64) < 1e-12


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_equals_the_reference_on_the_path_of_accelerators(name, options, monkeypatch):
    """Whole lists, norms and factors that stay on the device: everything but the device."""
    for module in (adam_moments, elementwise, momentum):
        monkeypatch.setattr(module, "on_eager_cpu", lambda tensors: False)
    assert run_both(name, options, torch.float64) < 1e-12
    assert run_both(name, options, torch.float32) < 1e-6


LANS_OPTIONS = [options for name, options in CASES if name == "lans"]


@pytest.mark.parametrize("options", LANS_OPTIONS, ids=[IDS[CASES.index(("lans", options))] for options in LANS_OPTIONS])
def test_kernels_of_compiled_lans_equal_the_reference(options, monkeypatch):
    kernels = (lans_compiled._moments_kernel, lans_compiled._step_kernel)
    monkeypatch.setattr(lans_compiled, "_kernels", lambda: kernels)  # as they are, without a compiler
    compiled_lans_on_small_tensors(monkeypatch, options)


@pytest.mark.slow
def test_compiled_lans_equals_the_reference(monkeypatch):
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        compiled_lans_on_small_tensors(monkeypatch, ADAM)


def compiled_lans_on_small_tensors(monkeypatch, options):
    called = []
    monkeypatch.setattr(batch, "SMALL", 5)
    monkeypatch.setattr(elementwise, "PIECE", 32)
    kernels = lans_compiled._kernels()
    monkeypatch.setattr(lans_compiled, "_kernels", lambda: called.append(1) or kernels)
    reference = REFERENCES["lans"]
    monkeypatch.setitem(REFERENCES, "lans", lambda *arrays, compile, **options: reference(*arrays, **options))
    assert run_both("lans", {**options, "compile": True}, torch.float64) < 1e-12
    assert run_both("lans", {**options, "compile": True}, torch.float32) < 1e-6
    assert len(called) > 2 * STEPS


@pytest.mark.slow
def test_compiled_lans_without_a_compiler_says_what_to_do(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    lans_compiled._kernels.cache_clear()
    torch.compiler.reset()
    param = torch.nn.Parameter(torch.randn(40_000))
    param.grad = torch.randn(40_000)
    optimizer = create_optimizer([param], "lans", compile=True)
    try:
        with pytest.raises(UsageError, match=r"compile=True found no working C\+\+ compiler"):
            optimizer.step()
    finally:
        lans_compiled._kernels.cache_clear()
        torch.compiler.reset()
