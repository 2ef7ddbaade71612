"""Models, data, and the statistics of gradients by holding all of them: what GradientStats is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SAMPLES = 16


class Net(nn.Module):
    """Even and uneven rows, fewer rows than ranks, a single element, a normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.b = nn.Linear(16, 7)
        self.c = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.norm(self.a(x)))))) * self.scale


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.h, self.o = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 1)
        self.h.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.h(torch.relu(self.e(x)))))


class Conv(nn.Module):
    """Weights that do not lie row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x.view(-1, 1, 2, 3).expand(-1, 2, -1, -1))).flatten(1))


class Routed(nn.Module):
    """``odd`` takes part only where the first sample says so."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.odd = nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + self.odd(x) if x[0, 0] > 0 else self.always(x)


MODELS: dict[str, type[nn.Module]] = {"net": Net, "tied": Tied, "conv": Conv, "routed": Routed}


def make_model(name: str = "net") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def data(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 6, generator=generator), torch.randn(samples, 1, generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def gradients(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> dict[str, Tensor]:
    """The gradient of each part of the batch by itself, [parts, *shape] in double, by parameter."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
        model.zero_grad()
        loss_of(model, x_part, y_part).backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            rows[name].append((torch.zeros_like(parameter) if grad is None else grad).double())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in rows.items()}


def mean_and_variance(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: (g.mean(0), g.var(0, unbiased=False)) for n, g in gradients(model, x, y, parts).items()}
