"""The callbacks gsnr and noise_scale: their numbers, with any optimizer, and the optimizers they give statistics to."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from plain_trainer import Plain, adamw, data, events, fit, scalars, tensorboard
from torch import Tensor, nn

import lbzoo
from lbzoo.callbacks.gradient_stats import StatsForOptimizers
from lbzoo.callbacks.gsnr import Gsnr
from lbzoo.callbacks.noise_scale import NoiseScale
from lbzoo.errors import UsageError
from lbzoo.gsnr import GradientStats, attached_stats

LAYERS = ["0.weight", "0.bias", "2.weight", "2.bias"]
K = 4


def gradients_of_first_step() -> dict[str, Tensor]:
    """Of each micro-batch by itself, [K, *shape], from the initial weights."""
    module = Plain(adamw).double()
    rows: dict[str, list[Tensor]] = {}
    for _, (x, y) in zip(range(K), data(), strict=False):
        module.zero_grad()
        module.training_step((x.double(), y), 0).backward()
        for name, parameter in module.named_parameters():
            rows.setdefault(name.removeprefix("model."), []).append(parameter.grad)
    return {name: torch.stack(each) for name, each in rows.items()}


def vr(name: str, **options: Any) -> Any:
    return lambda module: lbzoo.create_optimizer(module, name, lr=0.02, **options)


def train(module: Plain, *callbacks: Any, **options: Any) -> None:
    fit(module, *callbacks, accumulate_grad_batches=K, **{"max_steps": 3, **options})


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("optimizer", ["adamw", "vr_lamb"])
def test_numbers_of_the_first_step(tmp_path: Path, optimizer: str, clip: float | None) -> None:
    rows = gradients_of_first_step()
    mean = {name: g.mean(0) for name, g in rows.items()}
    variance = {name: g.var(0, unbiased=False) for name, g in rows.items()}
    ratio = {name: mean[name].square() / variance[name] for name in rows}
    callbacks = (Gsnr(every=2), NoiseScale(every=2, observe_every=1, layers=("*",)))
    module = Plain(vr(optimizer))
    train(module, *callbacks, logger=tensorboard(tmp_path), gradient_clip_val=clip)
    logged = scalars(tmp_path)
    for name in LAYERS:
        assert set(logged[f"gsnr/{name}"]) == {1, 2}
        assert logged[f"gsnr/{name}"][1] == pytest.approx(ratio[name].mean().item(), rel=1e-3)
    at_gamma = sum((each <= 0.1 * each.mean()).sum().item() for each in ratio.values())
    assert logged["summary/gsnr_at_gamma"][1] == pytest.approx(at_gamma / sum(each.numel() for each in ratio.values()))
    assert logged["summary/gsnr_gradients"][1] == K
    assert logged["summary/gsnr_noise_floor"][1] == 1
    assert logged["summary/gsnr_samples"][2] == 4
    signal, noise = (sum(each.square().sum() for each in mean.values()), sum(each.sum() for each in variance.values()))
    expected = float(1 - noise / (K - 1) / signal)
    assert logged["summary/generalization_ratio"][1] == pytest.approx(expected, rel=1e-4)
    assert events(tmp_path).Histograms("hist/gsnr")[0].histogram_value.num == len(LAYERS)
    # The samples of a micro-batch are known after the first one, so the first step with accumulation counts.
    assert logged["summary/noise_scale"][1] == pytest.approx(
        float(4 * K * noise / (K - 1) / (signal - noise / (K - 1))), rel=1e-4
    )
    assert logged["summary/noise_scale_of_batch"][1] == pytest.approx(logged["summary/noise_scale"][1] / 16)
    assert {f"noise_scale/{name}" for name in LAYERS} <= logged.keys()


def test_fp16_scale_is_divided_out(tmp_path: Path) -> None:
    """The gradients come multiplied by 65536; Lightning divides before the callbacks are asked."""

    class Scaled(Plain):
        def backward(self, loss: Tensor) -> None:
            (loss * 65536).backward()

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            for parameter in self.parameters():
                parameter.grad.div_(65536)

    for name, module in {"plain": Plain(adamw), "scaled": Scaled(adamw)}.items():
        train(module, Gsnr(every=1), NoiseScale(every=1), logger=tensorboard(tmp_path / name))
    plain, scaled = scalars(tmp_path / "plain"), scalars(tmp_path / "scaled")
    for tag in plain:
        assert scaled[tag] == pytest.approx(plain[tag], rel=1e-4), tag


def test_a_step_that_overflows_is_not_logged_and_leaves_no_trace(tmp_path: Path) -> None:
    class Overflows(Plain):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == K + 1 else 1)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            """Skip the step, as a GradScaler does; after the callbacks have been asked."""
            if any(not parameter.grad.isfinite().all() for parameter in self.parameters()):
                self.zero_grad()

    callbacks = (Gsnr(every=1), NoiseScale(every=1, observe_every=1, layers=("*",)))
    train(Overflows(adamw), *callbacks, logger=tensorboard(tmp_path))
    logged = scalars(tmp_path)
    for tag in ("gsnr/0.weight", "summary/gsnr_p50", "summary/gsnr_at_gamma", "summary/generalization_ratio"):
        assert set(logged[tag]) == {1, 3}, tag
    scales = logged["summary/noise_scale"]
    assert scales[2] == scales[1] != scales[3]
    assert not any(math.isnan(value) for values in logged.values() for value in values.values())


def test_nothing_is_collected_in_steps_that_are_not_logged(tmp_path: Path) -> None:
    collected: list[int] = []

    class Watch(Plain):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            stats = attached_stats(self)
            assert stats is not None
            if stats.num_gradients:
                collected.append(self.trainer.global_step + 1)
                assert stats.num_gradients == K

    train(Watch(adamw), Gsnr(every=3), NoiseScale(every=6, observe_every=2), logger=tensorboard(tmp_path), max_steps=6)
    assert collected == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("callbacks", [(), (Gsnr(every=100),)])
def test_vr_optimizers_get_their_statistics_in_any_trainer(callbacks: tuple[Any, ...]) -> None:
    """The weights are those of a loop that attaches them itself."""
    module = Plain(vr("vr_adamw"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(module, *callbacks, StatsForOptimizers())
        twin = Plain(vr("vr_adamw"))
        optimizer = twin.make_optimizer(twin)
        optimizer.attach_stats(GradientStats(twin))
        batches = list(data())
        for step in range(3):
            for batch in batches[step * K : (step + 1) * K]:
                (twin.training_step(batch, 0) / K).backward()
            optimizer.step()
            optimizer.zero_grad()
    for actual, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert attached_stats(module) is None


def test_statistics_that_were_there_stay_and_are_shared(tmp_path: Path) -> None:
    module = Plain(adamw)
    stats = GradientStats(module, micro_batch_size=4)
    train(module, Gsnr(every=2), logger=tensorboard(tmp_path))
    assert attached_stats(module) is stats
    assert set(scalars(tmp_path)["gsnr/0.weight"]) == {1, 2}


def test_pooled_gradients(tmp_path: Path) -> None:
    rows = gradients_of_first_step()
    train(Plain(vr("vr_sgd")), Gsnr(every=1, groups=2), StatsForOptimizers(), logger=tensorboard(tmp_path), max_steps=1)
    logged = scalars(tmp_path)
    assert logged["summary/gsnr_gradients"][1] == 2
    for name, g in rows.items():
        pooled = g.unflatten(0, (2, 2)).mean(1)
        expected = (pooled.mean(0).square() / pooled.var(0, unbiased=False)).mean().item()
        assert logged[f"gsnr/{name}"][1] == pytest.approx(expected, rel=1e-2)


def fit_with_warnings(optimizer: str) -> None:
    """One gradient a step, and warnings that ``fit`` would swallow."""
    pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[Gsnr(every=1), StatsForOptimizers()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(Plain(vr(optimizer)), data())


def test_one_gradient_a_step_is_a_warning_for_a_monitor() -> None:
    with pytest.warns(UserWarning, match="Gsnr logs nothing: 1 gradient a step has no variance"):
        fit_with_warnings("adamw")


@pytest.mark.filterwarnings("ignore")
def test_one_gradient_a_step_is_an_error_for_an_optimizer() -> None:
    with pytest.raises(UsageError, match="seen 1 gradient in this step"):
        fit_with_warnings("vr_lamb")


def test_mistakes() -> None:
    for callback in (Gsnr(layers=("encoder.*",)), NoiseScale(layers=("encoder.*",))):
        module = Plain(adamw)
        module.training_step = lambda *_: pytest.fail("a step was made")  # type: ignore[method-assign]
        with pytest.raises(UsageError, match="no layer matches"):
            train(module, callback)
    with pytest.raises(UsageError, match="groups=None already: name the callback that says groups=2 before"):
        train(Plain(adamw), NoiseScale(), Gsnr(groups=2))
    with pytest.raises(UsageError, match="gamma must be from 0 to 1"):
        Gsnr(gamma=2.0)
    with pytest.raises(UsageError, match="do not make groups=3"):
        train(Plain(adamw), Gsnr(groups=3))


def test_frozen_and_unused_parameters(tmp_path: Path) -> None:
    class Partly(Plain):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.spare = nn.Linear(2, 2)
            self.model[0].bias.requires_grad_(False)

    train(Partly(adamw), Gsnr(every=1), logger=tensorboard(tmp_path), max_steps=1)
    tags = {tag for tag in scalars(tmp_path) if tag.startswith("gsnr/")}
    assert tags == {"gsnr/0.weight", "gsnr/2.weight", "gsnr/2.bias"}
    layers = {"layers": ("spare.*",)}
    train(Partly(adamw), Gsnr(every=1, **layers), NoiseScale(every=1, **layers), logger=tensorboard(tmp_path / "spare"))
    logged = scalars(tmp_path / "spare")
    assert not [tag for tag in logged if "spare" in tag]
    assert set(logged["summary/gsnr_at_gamma"]) == set(logged["summary/noise_scale"]) == {1, 2, 3}
