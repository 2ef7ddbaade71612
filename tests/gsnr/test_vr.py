"""The VR optimizers against a double-precision reference, against their bases, and what they refuse."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vr_reference import Reference

import lbzoo
from lbzoo.errors import UsageError
from lbzoo.gsnr import GradientStats

SHAPES = [(13, 7), (4, 3, 2, 2), (6,), (1,)]
BASES = [name for name in lbzoo.list_optimizers() if not name.startswith(("vr_", "larc_"))]
PAPER = {
    "sgd": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "lars": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02},
    "adam": {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8},
    "lamb": {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
}
VARIANTS = [
    ("sgd", {}),
    ("momentum", {}),
    ("lars", {}),
    ("adam", {}),
    ("lamb", {}),
    ("sgd", {"gamma": 0.5, "gsnr_cap": 2.0}),
    ("momentum", {"beta3": 0.8}),
    ("adam", {"beta3": 0.0}),
    ("adam", {"second_moment": "raw"}),
    ("lamb", {"second_moment": "raw", "gsnr_cap": 1.5}),
]


class Parameters(nn.Module):
    """Its gradients are whatever is given to ``backward``. The last one is a table of which most rows are not seen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [*SHAPES, (9, 3)]
        self.all = nn.ParameterList([torch.randn(shape, generator=generator).to(dtype) for shape in shapes])

    def backward(self, gradients: Sequence[Tensor], parts: int) -> None:
        loss = sum((p * g.to(p.dtype)).sum() for p, g in zip(self.all, gradients, strict=True))
        (loss / parts).backward()


def gradients_of_step(step: int, k: int, *, identical: bool = False) -> list[list[Tensor]]:
    """k times the gradients of all parameters: a signal that differs by element, and noise."""
    generator = torch.Generator().manual_seed(100 + step)
    shapes = [*SHAPES, (9, 3)]
    signals = [torch.randn(shape, generator=generator) for shape in shapes]
    signals[-1][3:] = 0
    parts = []
    for _ in range(k):
        noise = [
            torch.randn(shape, generator=generator) * 10 ** torch.rand(shape, generator=generator) for shape in shapes
        ]
        noise[-1][3:] = 0
        parts.append([s if identical else s + n for s, n in zip(signals, noise, strict=True)])
    return parts


def vr(model: nn.Module, name: str, **options: Any) -> tuple[torch.optim.Optimizer, GradientStats]:
    optimizer = lbzoo.create_optimizer(model, name, **options)
    stats = GradientStats(model)
    optimizer.attach_stats(stats)
    return optimizer, stats


def train(
    model: Parameters, optimizer: torch.optim.Optimizer, steps: Sequence[int], k: int = 8, *, identical: bool = False
) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            for part in gradients_of_step(step, k, identical=identical):
                model.backward(part, k)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.all]


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize(("base", "variant"), VARIANTS)
def test_against_float64(base: str, variant: dict[str, Any], k: int) -> None:
    model = Parameters()
    options = {**PAPER[base], **variant}
    resolution = 8 * torch.finfo(torch.float32).eps
    references = [Reference(base, p.detach().double().numpy(), resolution=resolution, **options) for p in model.all]
    optimizer, _ = vr(model, f"vr_{base}", **options)
    for step in range(20):
        after = train(model, optimizer, [step], k)
        parts = gradients_of_step(step, k)
        for index, reference in enumerate(references):
            reference.step([part[index].double().numpy() for part in parts])
            np.testing.assert_allclose(after[index].numpy(), reference.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_gamma_of_one_is_the_base(base: str) -> None:
    bare = Parameters()
    expected = train(bare, lbzoo.create_optimizer(bare, base, lr=0.05), range(6))
    model = Parameters()
    optimizer, _ = vr(model, f"vr_{base}", lr=0.05, gamma=1.0)
    assert all(map(torch.equal, train(model, optimizer, range(6)), expected))


@pytest.mark.parametrize("base", BASES)
def test_identical_gradients_give_the_base(base: str) -> None:
    bare = Parameters()
    expected = train(bare, lbzoo.create_optimizer(bare, base, lr=0.05), range(6), identical=True)
    model = Parameters()
    optimizer, _ = vr(model, f"vr_{base}", lr=0.05)
    assert all(map(torch.equal, train(model, optimizer, range(6), identical=True), expected))


def test_every_name_exists_and_says_what_it_needs() -> None:
    assert set(lbzoo.list_optimizers("vr_*")) == {f"vr_{base}" for base in BASES}
    info = lbzoo.get_optimizer_info("vr_lamb")
    assert info.needs_gradient_stats
    assert info.paper == "arXiv 2309.13681"
    assert not lbzoo.get_optimizer_info("lamb").needs_gradient_stats


@pytest.mark.parametrize("base", ["momentum", "adam", "lamb"])
def test_gradients_are_left_alone(base: str) -> None:
    model = Parameters()
    optimizer, _ = vr(model, f"vr_{base}", lr=0.05)
    for part in gradients_of_step(0, 8):
        model.backward(part, 8)
    kept = [(p.grad, p.grad.clone()) for p in model.all]
    optimizer.step()
    for p, (same, copied) in zip(model.all, kept, strict=True):
        assert p.grad is same
        assert torch.equal(p.grad, copied)


@pytest.mark.parametrize("factor", [1e-3, 2.0**-16])
@pytest.mark.parametrize("options", [{}, {"gsnr_cap": 2.0}])
def test_clipped_or_unscaled_gradients_have_the_same_ratios(factor: float, options: dict[str, Any]) -> None:
    """SGD on gradients times c moves c times as far."""
    moves = []
    for scale in (1.0, factor):
        model = Parameters(torch.float64)
        before = [p.detach().clone() for p in model.all]
        optimizer, _ = vr(model, "vr_sgd", lr=0.1 / scale, **options)
        for part in gradients_of_step(0, 8):
            model.backward(part, 8)
        for p in model.all:
            p.grad.mul_(scale)
        optimizer.step()
        moves.append([p.detach() - x for p, x in zip(model.all, before, strict=True)])
    for one, other in zip(*moves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("base", ["sgd", "adam", "lamb", "novograd"])
@pytest.mark.parametrize("options", [{}, {"beta3": 0.8}])
def test_state_survives_a_checkpoint(base: str, options: dict[str, Any]) -> None:
    model = Parameters()
    optimizer, _ = vr(model, f"vr_{base}", lr=0.05, **options)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Parameters()
    resumed.load_state_dict(saved["model"])
    fresh, _ = vr(resumed, f"vr_{base}", lr=0.05, **options)
    fresh.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, train(resumed, fresh, range(3, 6)), expected))


@pytest.mark.parametrize("base", ["momentum", "adam", "lamb"])
def test_distributed_checkpoints_step_without_statistics(base: str) -> None:
    """They have the state made by a step on zero gradients, which must leave the weights and the average alone."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = Parameters()
    optimizer, _ = vr(model, f"vr_{base}", lr=0.05)
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    expected = train(model, optimizer, range(3, 6))

    resumed = Parameters()
    fresh, _ = vr(resumed, f"vr_{base}", lr=0.05)
    empty = get_state_dict(resumed, fresh)[1]
    assert empty["state"].keys() == state["state"].keys()
    assert all(empty["state"][name].keys() == state["state"][name].keys() for name in state["state"])
    assert all(torch.equal(p, q) for p, q in zip(resumed.all, Parameters().all, strict=True))
    set_state_dict(resumed, fresh, model_state_dict=weights, optim_state_dict=state)
    assert all(map(torch.equal, train(resumed, fresh, range(3, 6)), expected))


def test_the_average_of_half_precision_parameters_is_float32() -> None:
    model = Parameters(torch.bfloat16)
    optimizer, _ = vr(model, "vr_adam", lr=0.01)
    train(model, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {state["gsnr_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in train(model, optimizer, range(2, 4)))


def test_a_step_that_the_scaler_skips_drops_its_statistics() -> None:
    model, twin = Parameters(), Parameters()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    optimizer, stats = vr(model, "vr_momentum", lr=0.05)
    for part in gradients_of_step(0, 8):
        part[0][0, 0] = torch.inf
        model.backward([1024 * g for g in part], 8)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.all, twin.all, strict=True))
    optimizer.zero_grad(set_to_none=False)

    for part in gradients_of_step(1, 8):
        model.backward([scaler.get_scale() * g for g in part], 8)
    assert stats.num_gradients == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizer)
    expected = train(twin, vr(twin, "vr_momentum", lr=0.05)[0], [1])
    for p, x in zip(model.all, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-6, atol=1e-7)


def test_a_closure_may_make_the_gradients() -> None:
    model, twin = Parameters(), Parameters()
    optimizer, _ = vr(model, "vr_adam", lr=0.05)

    def closure() -> float:
        for part in gradients_of_step(0, 8):
            model.backward(part, 8)
        return 3.5

    assert optimizer.step(closure) == 3.5
    expected = train(twin, vr(twin, "vr_adam", lr=0.05)[0], [0])
    assert all(torch.equal(p, x) for p, x in zip(model.all, expected, strict=True))


def test_parameter_rules_reach_the_ratios() -> None:
    """Parameters with gamma = 1 are trained by the base, the others are not."""
    rules = [{"match": "all.0", "gamma": 1.0}]
    model, bare = Parameters(), Parameters()
    optimizer, _ = vr(model, "vr_lamb", lr=0.05, param_rules=rules)
    # In the same groups: what is summed up together rounds alike.
    base = lbzoo.create_optimizer(bare, "lamb", lr=0.05, param_rules=[{"match": "all.0", "lr_scale": 1.0}])
    after, expected = train(model, optimizer, range(3)), train(bare, base, range(3))
    assert torch.equal(after[0], expected[0])
    assert not torch.equal(after[1], expected[1])


def test_layer_statistics_hold_the_gsnr() -> None:
    model = Parameters()
    optimizer, stats = vr(model, "vr_lamb", lr=0.05)
    for part in gradients_of_step(0, 8):
        model.backward(part, 8)
    expected = torch.stack(list(stats.mean_gsnr_per_layer().values()))
    optimizer.track_layer_stats = True
    optimizer.step()
    reported = optimizer.layer_stats()
    assert reported.names == [f"all.{index}" for index in range(5)]
    torch.testing.assert_close(reported.values["gsnr"], expected)
    assert {"trust_ratio", "update_ratio", "param_norm", "grad_norm"} <= reported.values.keys()


@pytest.mark.parametrize("base", BASES)
def test_every_base_has_the_statistics_that_monitors_show(base: str) -> None:
    """Where the base publishes none: |x| / |u| with u the step over the learning rate, as monitors measure it."""
    model = Parameters(torch.float64)
    optimizer, _ = vr(model, f"vr_{base}", param_rules=[{"match": "all.0", "lr_scale": 0.5}], lr=0.02)
    train(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.track_layer_stats = True
    train(model, optimizer, [2])
    stats = optimizer.layer_stats()
    assert {"trust_ratio", "update_ratio", "param_norm", "grad_norm", "gsnr"} <= stats.values.keys()
    for row, name in enumerate(stats.names):
        size, step = before[name].norm(), (model.get_parameter(name) - before[name]).norm()
        lr = 0.01 if name == "all.0" else 0.02
        assert stats.values["update_ratio"][row].item() == pytest.approx((step / size).item(), rel=1e-3)
        if not lbzoo.get_optimizer_info(base).layerwise:
            assert stats.values["trust_ratio"][row].item() == pytest.approx((lr * size / step).item(), rel=1e-3)


def test_schedulers_and_frozen_parameters() -> None:
    model = Parameters()
    model.all[1].requires_grad_(False)
    optimizer, _ = vr(model, "vr_sgd", lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.5**done)
    before = model.all[1].detach().clone()
    for step in range(3):
        train(model, optimizer, [step])
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert torch.equal(model.all[1], before)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        action()
    return str(caught.value)


def test_no_statistics() -> None:
    model = Parameters()
    optimizer = lbzoo.create_optimizer(model, "vr_lamb", lr=0.05)
    model.backward(gradients_of_step(0, 1)[0], 1)
    assert "optimizer.attach_stats(stats)" in refused(optimizer.step)


def test_one_gradient() -> None:
    model = Parameters()
    optimizer, _ = vr(model, "vr_lamb", lr=0.05)
    model.backward(gradients_of_step(0, 1)[0], 1)
    message = refused(optimizer.step)
    assert "seen 1 gradient in this step" in message
    assert "accumulate_grad_batches" in message


def test_statistics_of_another_model() -> None:
    model, other = Parameters(), Parameters()
    optimizer = lbzoo.create_optimizer(model, "vr_lamb", lr=0.05)
    optimizer.attach_stats(GradientStats(other))
    for part in gradients_of_step(0, 2):
        model.backward(part, 2)
        other.backward(part, 2)
    assert "does not see 5 parameters" in refused(optimizer.step)


def test_few_gradients_are_a_warning_once() -> None:
    model = Parameters()
    optimizer, _ = vr(model, "vr_sgd", lr=0.05)
    for part in gradients_of_step(0, 4):
        model.backward(part, 4)
    with pytest.warns(UserWarning, match="k = 4 gradients a step .* k >= 8"):
        optimizer.step()
    optimizer.zero_grad()
    for part in gradients_of_step(1, 4):
        model.backward(part, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_another_k_after_a_resume_is_a_warning() -> None:
    model = Parameters()
    optimizer, _ = vr(model, "vr_sgd", lr=0.05)
    train(model, optimizer, range(2), k=16)
    fresh, _ = vr(resumed := Parameters(), "vr_sgd", lr=0.05)
    fresh.load_state_dict(optimizer.state_dict())
    for part in gradients_of_step(2, 8):
        resumed.backward(part, 8)
    with pytest.warns(UserWarning, match=r"saved with k = 16 .* goes on with k = 8.*groups=16"):
        fresh.step()
    fresh.zero_grad()
    for part in gradients_of_step(3, 8):
        resumed.backward(part, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.step()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vr_sgd", {"gamma": 1.5}, "gamma must be a number from 0 to 1"),
        ("vr_sgd", {"beta3": 1.0}, "beta3 must be null, or a number at least 0 and below 1"),
        ("vr_sgd", {"gsnr_cap": 0}, "gsnr_cap must be null, or a number above 0"),
        ("vr_adam", {"second_moment": "both"}, "second_moment must be 'adapted' or 'raw'"),
        ("vr_sgd", {"second_moment": "raw"}, "adam, adamw, nadam, lamb and nlamb only"),
        ("vr_nnlamb", {"second_moment": "raw"}, "adam, adamw, nadam, lamb and nlamb only"),
        ("vr_adam", {"second_moment": "raw", "betas": (0.9, 0.0)}, "betas[1] above 0"),
        ("vr_lamb", {"gama": 0.5}, "did you mean 'gamma'"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: lbzoo.create_optimizer(Parameters(), name, **options))
