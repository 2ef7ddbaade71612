"""A small module, a plain Lightning Trainer around it, and its TensorBoard events read back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lbzoo.optim.layer_stats import LayerStats

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


class Plain(pl.LightningModule):
    """Two layers on random data: what anybody's module could be. Its parameters are ``model.0.weight`` and so on."""

    monitor = "val/top1"

    def __init__(self, make_optimizer: OptimizerFactory, *, decay: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.make_optimizer, self.decay = make_optimizer, decay

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self.model(x)
        self.log("val/loss", nn.functional.cross_entropy(logits, y))
        self.log("val/top1", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FakeLayerwise(torch.optim.SGD):
    """Plain descent that publishes layer_stats() as lbzoo's optimizers do. ``tracked``: the steps that filled it."""

    track_layer_stats = False

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> None:
        super().__init__(named, lr=lr)
        self.steps, self.tracked, self._stats = 0, list[int](), LayerStats()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure else None
        self.steps += 1
        if self.track_layer_stats:
            self.tracked.append(self.steps)
            named = [(n, p) for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]
            x = torch.stack([p.detach().norm() for _, p in named])
            g = torch.stack([p.grad.norm() for _, p in named])
            lr = self.param_groups[0]["lr"]
            values = {"trust_ratio": x / g, "param_norm": x, "grad_norm": g, "update_ratio": lr * g / x}
            self._stats = LayerStats([name for name, _ in named], values)
        super().step()
        return loss

    def layer_stats(self) -> LayerStats:
        return self._stats


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)


def fake_layerwise(module: nn.Module) -> FakeLayerwise:
    return FakeLayerwise(list(module.named_parameters()), lr=0.05)


def data(samples: int = 48, micro_batch_size: int = 4) -> DataLoader[Any]:
    """Not shuffled: batch i holds the samples from i * micro_batch_size."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 6, generator=generator)
    y = torch.randint(3, (samples,), generator=generator)
    return DataLoader(TensorDataset(x, y), micro_batch_size)


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    logger: Logger | list[Logger] | bool = False,
    loader: DataLoader[Any] | None = None,
    validate: bool = False,
    ckpt_path: Path | None = None,
    **trainer_options: Any,
) -> pl.Trainer:
    options = {"max_steps": 12, "accelerator": "cpu", "devices": 1, **trainer_options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            logger=logger,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )
        trainer.fit(module, loader or data(), data() if validate else None, ckpt_path=ckpt_path, weights_only=False)
    return trainer


def tensorboard(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name="", version="")


def events(folder: Path) -> EventAccumulator:
    """All that was written, nothing sampled away."""
    accumulator = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """``{tag: {step: value}}``; fails where a tag has two values at one step."""
    accumulator = events(folder)
    table: dict[str, dict[int, float]] = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            assert event.step not in table.setdefault(tag, {}), f"{tag} twice at step {event.step}"
            table[tag][event.step] = event.value
    return table
