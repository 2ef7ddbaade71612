"""Against other people's implementations: float32, 30 steps, mixed shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lbzoo.optim import create_optimizer

SHAPES = [(40, 30), (7, 5), (33,), (1,), (), (4, 3, 2, 2)]


def make_params(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def run(name: str, options: dict, steps: int = 30) -> list[torch.Tensor]:
    params = make_params()
    optimizer = create_optimizer(params, name, **options)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach() for param in params]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of all parameters together, relative in the 2-norm."""
    flat, other_flat = (torch.cat([tensor.flatten() for tensor in tensors]).double() for tensors in (one, other))
    return float((flat - other_flat).norm() / other_flat.norm())


FAITHFUL_LAMB = {"max_grad_norm": None, "always_adapt": True}
TIMM_LARS = {"momentum": 0.9, "always_adapt": True, "trust_coeff": 0.02, "eps": 0.0}


@pytest.mark.parametrize(
    ("ours", "options", "peer", "peer_options", "tolerance"),
    [
        ("lamb", {"weight_decay": 0.02}, "timm:lamb", {"weight_decay": 0.02, **FAITHFUL_LAMB}, 2e-7),
        ("lamb", {"weight_decay": 0.0}, "timm:lamb", {"weight_decay": 0.0, **FAITHFUL_LAMB}, 2e-7),
        ("lamb", {"bias_correction": False}, "timm:lamb", {"bias_correction": False, **FAITHFUL_LAMB}, 2e-7),
        ("lamb", {"adapt": False}, "torch:AdamW", {"eps": 1e-6, "weight_decay": 0.01}, 2e-7),
        (
            "lars",
            {"weight_decay": 0.02, "trust_coefficient": 0.02, "lr_in_momentum": False},
            "timm:lars",
            {"weight_decay": 0.02, **TIMM_LARS},
            2e-8,
        ),
        (
            "lars",
            {"lr": 0.5, "trust_coefficient": 0.02, "lr_in_momentum": False, "nesterov": True},
            "timm:lars",
            {"lr": 0.5, "nesterov": True, **TIMM_LARS},
            1e-7,
        ),
        (
            "lars",
            {"lr": 0.01, "weight_decay": 0.02, "trust_coefficient": 0.02, "lr_in_momentum": False, "clip": True},
            "timm:lars",
            {"lr": 0.01, "weight_decay": 0.02, "trust_clip": True, **TIMM_LARS},
            1e-7,
        ),
        ("lars", {"adapt": False, "momentum": 0.8}, "torch:SGD", {"momentum": 0.8}, 1e-7),
        ("larc_momentum", {"trust_coefficient": 0.02}, "timm:lars", {**TIMM_LARS, "trust_clip": True}, 1e-7),
        (
            "novograd",
            {"betas": (0.95, 0.98), "weight_decay": 0.02},
            "timm:novograd",
            {"betas": (0.95, 0.98), "weight_decay": 0.02, "grad_averaging": False},
            3e-7,
        ),
    ],
)  # fmt: skip
def test_peer(ours, options, peer, peer_options, tolerance):
    assert difference(run(ours, {"lr": 0.02, **options}), run(peer, {"lr": 0.02, **peer_options})) < tolerance


def test_n_lamb_without_adaptation_is_nadam():
    """torch's NAdam has no factor b2 on the second moment: it moves into the learning rate and eps. Its momentum
    schedule is off where its decay is so large that 0.96^(step * decay) is 0."""
    root = math.sqrt(0.999)
    ours = run("nlamb", {"lr": 0.02, "adapt": False, "weight_decay": 0.0, "eps": 1e-8})
    nadam = run("torch:NAdam", {"lr": 0.02 / root, "betas": (0.975, 0.999), "eps": 1e-8 / root, "momentum_decay": 1e6})
    assert difference(ours, nadam) < 1e-6


def test_block_normalised_adamw_is_adamw_on_normalised_gradients():
    params, others = make_params(), make_params()
    ours = create_optimizer(params, "bnadamw", lr=0.02)
    adamw = torch.optim.AdamW(others, lr=0.02, eps=1e-6)
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            other.grad = param.grad / param.grad.norm()
        ours.step()
        adamw.step()
    assert difference([param.detach() for param in params], [other.detach() for other in others]) < 1e-6


def test_lamb_without_memory_is_sign_descent_scaled_to_the_weights():
    """LAMB paper, section 3.2: with both betas 0 the direction is sign(g), whose norm is sqrt(d)."""
    params = [nn.Parameter(torch.randn(30, 10)), nn.Parameter(torch.randn(7))]
    optimizer = create_optimizer(params, "lamb", lr=0.1, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    for seed in range(5):
        expected = []
        for index, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * seed + index))
            x = param.detach().double()
            expected.append(x - 0.1 * x.norm() / math.sqrt(x.numel()) * param.grad.double().sign())
        optimizer.step()
        for param, value in zip(params, expected, strict=True):
            torch.testing.assert_close(param.detach().double(), value, rtol=1e-6, atol=1e-6)


def test_novograd_without_memory_is_normalised_gradient_descent():
    param = nn.Parameter(torch.randn(30, 10))
    optimizer = create_optimizer([param], "novograd", lr=0.1, betas=(0.0, 0.0))
    for seed in range(3):
        param.grad = 50 * torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        expected = param.detach() - 0.1 * param.grad / param.grad.norm()
        optimizer.step()
        torch.testing.assert_close(param.detach(), expected)
