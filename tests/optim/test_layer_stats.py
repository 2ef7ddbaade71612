"""Statistics of a step against brute force on copies of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lbzoo.optim import create_optimizer, list_optimizers

OWN = [
    "lamb",
    "nlamb",
    "nnlamb",
    "lans",
    "bnadamw",
    "lars",
    "lars2020",
    "novograd",
    "larc_lamb",
    "larc_adam",
    "larc_sgd",
]
OPTIONS = [
    *((name, {}) for name in OWN),
    ("lamb", {"norm_order": 1}),
    ("lamb", {"adapt": False}),
    ("lans", {"adapt": False}),
    ("lars", {"nesterov": True}),
    ("lars", {"lr_in_momentum": False}),
    ("lars", {"adapt": False}),
    ("novograd", {"decoupled": True}),
    ("novograd", {"amsgrad": True, "ema": True}),
]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    model.unused = nn.Parameter(torch.ones(2))
    return model


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        param.grad = None if name == "unused" else torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_norms_and_ratios_are_those_of_the_step(name, options):
    model = make_model()
    rules = [{"match": "0.*", "lr_scale": 0.5}, {"match": "*.bias", "weight_decay": 0.0}]
    optimizer = create_optimizer(model, name, lr=0.01, weight_decay=0.1, param_rules=rules, **options)
    for seed in range(3):
        take_step(model, optimizer, seed)
    assert optimizer.layer_stats().names == []
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    optimizer.track_layer_stats = True
    take_step(model, optimizer, 3)
    stats = optimizer.layer_stats()

    in_groups = [key for group in optimizer.param_groups for key in group["param_names"] if key != "unused"]
    assert stats.names == in_groups
    assert len(in_groups) == 5
    after = dict(model.named_parameters())
    x = torch.stack([before[key].norm() for key in in_groups])
    g = torch.stack([after[key].grad.norm() for key in in_groups])
    change = torch.stack([(after[key] - before[key]).norm() for key in in_groups])
    assert {"trust_ratio", "param_norm", "grad_norm", "update_ratio"} <= stats.values.keys()
    assert all(value.shape == (5,) and value.dtype == torch.float32 for value in stats.values.values())
    torch.testing.assert_close(stats.values["param_norm"], x)
    torch.testing.assert_close(stats.values["grad_norm"], g)
    torch.testing.assert_close(stats.values["update_ratio"], torch.where(x > 0, change / x, 0.0), rtol=1e-3, atol=1e-5)

    optimizer.track_layer_stats = False
    take_step(model, optimizer, 4)
    assert optimizer.layer_stats() is stats


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("small", [-1, 1 << 15])  # -1: without them large tensors go by tensor on a CPU
def test_asking_for_statistics_does_not_change_the_step(name, options, small, monkeypatch):
    monkeypatch.setattr("lbzoo.optim.batch.SMALL", small)
    plain, tracked = make_model(), make_model()
    optimizers = [create_optimizer(model, name, lr=0.01, weight_decay=0.1, **options) for model in (plain, tracked)]
    optimizers[1].track_layer_stats = True
    for seed in range(3):
        for model, optimizer in zip((plain, tracked), optimizers, strict=True):
            take_step(model, optimizer, seed)
    for one, other in zip(plain.parameters(), tracked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_trust_ratio_is_the_factor_of_the_step():
    """LAMB: |x| / |u|, so lr * trust_ratio * |u| / |x| = lr; LARS: c |x| / (|g| + d |x|)."""
    model = make_model()
    lamb = create_optimizer(model, "lamb", lr=0.01)
    lamb.track_layer_stats = True
    take_step(model, lamb, 0)
    moving = lamb.layer_stats().values["param_norm"] > 0
    torch.testing.assert_close(lamb.layer_stats().values["update_ratio"][moving], torch.full((4,), 0.01))

    lars = create_optimizer(model, "lars", lr=0.1, trust_coefficient=0.02, weight_decay=0.3)
    lars.track_layer_stats = True
    take_step(model, lars, 1)
    values = lars.layer_stats().values
    expected = 0.02 * values["param_norm"] / (values["grad_norm"] + 0.3 * values["param_norm"])
    torch.testing.assert_close(values["trust_ratio"], torch.where(values["param_norm"] > 0, expected, 1.0))


def test_novograd_reports_what_it_divides_by():
    model = make_model()
    optimizer = create_optimizer(model, "novograd", lr=0.01)
    optimizer.track_layer_stats = True
    take_step(model, optimizer, 0)
    values = optimizer.layer_stats().values
    torch.testing.assert_close(values["grad_scale"], 1 / values["grad_norm"])
    torch.testing.assert_close(values["trust_ratio"][:1], values["param_norm"][:1])  # |m| = 1 at the first step


def test_statistics_of_nothing():
    for name in ("lamb", "larc_sgd"):
        optimizer = create_optimizer(make_model(), name)
        optimizer.track_layer_stats = True
        optimizer.step()
        assert optimizer.layer_stats().names == []
        assert optimizer.layer_stats().values == {}


def test_names_without_names():
    first, *rest = make_model().parameters()
    optimizer = create_optimizer([{"params": [first]}, {"params": rest, "lr": 0.1}], "lamb")
    optimizer.track_layer_stats = True
    for param in (first, *rest):
        param.grad = torch.ones_like(param)
    rest[1].grad = None
    optimizer.step()
    assert optimizer.layer_stats().names == ["group0.0", "group1.0", "group1.2", "group1.3", "group1.4"]


def test_every_layer_wise_optimizer_has_statistics():
    from lbzoo.optim import get_optimizer_info

    for name in list_optimizers():
        if get_optimizer_info(name).layerwise and not get_optimizer_info(name).needs_gradient_stats:
            assert hasattr(create_optimizer(make_model(), name, lr=0.1), "layer_stats"), name
