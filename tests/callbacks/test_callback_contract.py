"""What every registered callback must do: work in anybody's Trainer, and leave the training as it is."""

from __future__ import annotations

import inspect
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from plain_trainer import Plain, adamw, fit, scalars, tensorboard
from torch import nn

import lbzoo
from lbzoo.errors import UsageError
from lbzoo.registry import callbacks
from lbzoo.signatures import REQUIRED

NAMES = callbacks.names()
OPTIMIZERS = {
    "torch_adamw": adamw,
    "lamb": lambda module: lbzoo.create_optimizer(module, "lamb", lr=0.02),
    "novograd": lambda module: lbzoo.create_optimizer(module, "novograd", lr=0.02),
}


def make(name: str) -> Callback:
    """With its defaults, at every other step where it can be told."""
    options = {"every": 2} if "every" in callbacks.entry(name).options else {}
    return callbacks.get(name)(**options)


def test_ours_are_registered() -> None:
    assert {"progress", "train_metrics", "trust_ratio"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keywords_with_types_and_defaults(name: str) -> None:
    for parameter in list(inspect.signature(callbacks.get(name)).parameters.values()):
        assert parameter.kind is parameter.KEYWORD_ONLY
    options = callbacks.entry(name).options
    assert options is not None
    for option in options.values():
        assert option.annotation is not typing.Any, f"{name}.{option.name}: its type cannot be read from the source"
        assert option.default is not REQUIRED
    assert callbacks.entry(name).first_line.endswith(".")


@pytest.mark.parametrize("name", [name for name in NAMES if "every" in callbacks.entry(name).options])
def test_every_is_a_positive_number_of_steps(name: str) -> None:
    with pytest.raises(UsageError, match=r"every: .* at least 1, not 0"):
        callbacks.get(name)(every=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same_with_it(name: str, optimizer: str, tmp_path: Path) -> None:
    """Bit for bit, with validations, accumulation and clipping, and with several loggers."""
    options: dict[str, Any] = {
        "max_steps": 5,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "validate": True,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    }
    without, with_it = Plain(OPTIMIZERS[optimizer]), Plain(OPTIMIZERS[optimizer])
    fit(without, **options)
    loggers = [tensorboard(tmp_path / "tb"), CSVLogger(str(tmp_path), name="csv", version="")]
    fit(with_it, make(name), logger=loggers, **options)
    for (key, expected), actual in zip(without.state_dict().items(), with_it.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), key
    scalars(tmp_path / "tb")  # nothing stands twice at one step


@pytest.mark.parametrize("name", NAMES)
def test_without_a_logger(name: str) -> None:
    fit(Plain(adamw), make(name), max_steps=4)


@pytest.mark.parametrize("name", NAMES)
def test_stages_after_one_another(name: str, tmp_path: Path) -> None:
    """One object in two Trainers, the second with another module."""

    class Wider(Plain):
        def __init__(self, make_optimizer: Any) -> None:
            super().__init__(make_optimizer)
            self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))

    callback = make(name)
    fit(Plain(adamw), callback, logger=tensorboard(tmp_path / "one"), max_steps=4)
    fit(Wider(adamw), callback, logger=tensorboard(tmp_path / "two"), max_steps=4)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_sent_to_another_process(name: str) -> None:
    pickle.loads(pickle.dumps(make(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_training_can_be_followed_by_another(name: str) -> None:
    class Failing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                raise RuntimeError("once")
            return super().training_step(batch, batch_idx)

    callback = make(name)
    with pytest.raises(RuntimeError, match="once"):
        fit(Failing(adamw), callback)
    fit(Plain(adamw), callback, max_steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str, tmp_path: Path) -> None:
    fit(Plain(adamw), make(name), logger=tensorboard(tmp_path), precision="bf16-true", max_steps=4)
