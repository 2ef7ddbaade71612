"""TrustRatio against norms worked out by hand in float64 from a training loop without Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from plain_trainer import FakeLayerwise, Plain, adamw, data, events, fake_layerwise, fit, scalars, tensorboard
from torch import nn

import lbzoo
from lbzoo.callbacks.layer_stats import join
from lbzoo.callbacks.optimizer_view import short_names, unwrap
from lbzoo.callbacks.trust_ratio import TrustRatio
from lbzoo.errors import UsageError
from lbzoo.optim.layer_stats import LayerStats

LAYERS = ["0.weight", "0.bias", "2.weight", "2.bias"]
Row = dict[str, dict[str, float]]  # quantity -> layer -> value


def by_hand(module: Plain, *, steps: int, accumulate: int = 1) -> dict[int, Row]:
    """Every quantity of every layer at every step of a plain loop; the lr decays as Plain's scheduler has it."""
    module = module.double()
    optimizer = module.make_optimizer(module)
    batches = list(data()) * steps
    lr, table = optimizer.param_groups[0]["lr"], {}
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * module.decay ** (step - 1)
        optimizer.zero_grad()
        for x, y in batches[(step - 1) * accumulate : step * accumulate]:
            (module.training_step((x.double(), y), 0) / accumulate).backward()
        named = {name.removeprefix("model."): p for name, p in module.named_parameters()}
        before = {name: p.detach().numpy().copy() for name, p in named.items()}
        gradients = {name: p.grad.numpy().copy() for name, p in named.items()}
        optimizer.step()
        row: Row = {"trust_ratio": {}, "update_ratio": {}, "grad_norm": {}}
        for name, p in named.items():
            x, moved = np.linalg.norm(before[name]), np.linalg.norm(p.detach().numpy() - before[name])
            row["trust_ratio"][name] = x / (moved / optimizer.param_groups[0]["lr"])
            row["update_ratio"][name] = moved / x
            row["grad_norm"][name] = float(np.linalg.norm(gradients[name]))
        table[step] = row
    return table


def assert_logged(folder: Path, expected: dict[int, Row]) -> None:
    """Everything under a quantity's prefix is as expected, and nothing else is there."""
    logged = scalars(folder)
    for quantity in ("trust_ratio", "update_ratio", "grad_norm"):
        tags = {tag for tag in logged if tag.startswith(f"{quantity}/")}
        assert tags == {f"{quantity}/{layer}" for layer in LAYERS}
        for layer in LAYERS:
            series = logged[f"{quantity}/{layer}"]
            assert series == pytest.approx({s: row[quantity][layer] for s, row in expected.items()}, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make_optimizer", [adamw, fake_layerwise])
def test_every_layer_equals_the_norms_by_hand(tmp_path: Path, make_optimizer: Any, accumulate: int) -> None:
    expected = by_hand(Plain(make_optimizer, decay=0.9), steps=7, accumulate=accumulate)
    fit(
        Plain(make_optimizer, decay=0.9),
        TrustRatio(every=3),
        logger=tensorboard(tmp_path),
        max_steps=7,
        accumulate_grad_batches=accumulate,
        precision="64-true",
    )
    assert_logged(tmp_path, {step: expected[step] for step in (1, 3, 6)})


def test_lamb_reports_the_factor_that_it_applied(tmp_path: Path) -> None:
    """At the first step LAMB's direction is known in closed form: g / (|g| + eps) + d x for every element."""
    lr, eps, decay = 0.02, 1e-6, 0.01

    def lamb(module: nn.Module) -> torch.optim.Optimizer:
        return lbzoo.create_optimizer(module, "lamb", lr=lr, eps=eps, weight_decay=decay)

    module = Plain(lamb).double()
    x, y = next(iter(data()))
    module.training_step((x.double(), y), 0).backward()
    fit(Plain(lamb), TrustRatio(every=3), logger=tensorboard(tmp_path), precision="64-true", max_steps=6)
    logged = scalars(tmp_path)
    for name, parameter in module.named_parameters():
        layer, weight, g = name.removeprefix("model."), parameter.detach().numpy(), parameter.grad.numpy()
        direction = g / (np.abs(g) + eps) + decay * weight
        expected = np.linalg.norm(weight) / np.linalg.norm(direction)
        assert logged[f"trust_ratio/{layer}"][1] == pytest.approx(expected, rel=1e-6)
        assert logged[f"grad_norm/{layer}"][1] == pytest.approx(np.linalg.norm(g), rel=1e-6)
        # What the factor is for: every layer moves by the same share of its norm.
        assert logged[f"update_ratio/{layer}"] == pytest.approx(dict.fromkeys((1, 3, 6), lr), rel=1e-6)


def test_summary_holds_the_quantiles_over_the_layers(tmp_path: Path) -> None:
    fit(Plain(adamw), TrustRatio(every=4), logger=tensorboard(tmp_path))
    logged = scalars(tmp_path)
    assert {tag for tag in logged if tag.startswith("summary/")} == {
        *(f"summary/trust_ratio_{q}" for q in ("min", "p10", "p50", "p90", "max")),
        *(f"summary/update_ratio_{q}" for q in ("p10", "p50", "p90")),
    }
    for step in (1, 4, 8, 12):
        values = np.array([logged[f"trust_ratio/{layer}"][step] for layer in LAYERS])
        for name, share in (("min", 0), ("p10", 10), ("p50", 50), ("p90", 90), ("max", 100)):
            assert logged[f"summary/trust_ratio_{name}"][step] == pytest.approx(np.percentile(values, share), rel=1e-5)


def test_a_logged_step_is_one_event(tmp_path: Path) -> None:
    fit(Plain(adamw), TrustRatio(every=4, histogram=False, heatmap=False), logger=tensorboard(tmp_path))
    times = {
        event.wall_time
        for tag in events(tmp_path).Tags()["scalars"]
        for event in events(tmp_path).Scalars(tag)
        if event.step == 8
    }
    assert len(times) == 1


def test_histogram_and_heatmap(tmp_path: Path) -> None:
    fit(Plain(adamw), TrustRatio(every=2), logger=tensorboard(tmp_path))
    written = events(tmp_path)
    histogram = written.Histograms("hist/trust_ratio")[-1]
    ratios = [scalars(tmp_path)[f"trust_ratio/{layer}"][12] for layer in LAYERS]
    value = histogram.histogram_value
    assert (histogram.step, value.num, sum(value.bucket)) == (12, 4, 4)
    assert (value.min, value.max) == pytest.approx((min(np.log10(ratios)), max(np.log10(ratios))), rel=1e-5)
    images = written.Images("heatmap/trust_ratio")
    assert images[0].step == 1
    assert images[-1].step == 12  # what came since the last drawing is drawn at the end
    assert images[-1].width > 100


def test_histogram_and_heatmap_can_be_left_out(tmp_path: Path) -> None:
    fit(Plain(adamw), TrustRatio(every=2, histogram=False, heatmap=False), logger=tensorboard(tmp_path))
    tags = events(tmp_path).Tags()
    assert tags["images"] == tags["histograms"] == []


def test_stats_are_tracked_in_logged_steps_only() -> None:
    module = Plain(fake_layerwise)
    trainer = fit(module, TrustRatio(every=5))
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, FakeLayerwise)
    assert optimizer.tracked == [1, 5, 10]
    assert optimizer.track_layer_stats is False


def test_weights_are_copied_in_logged_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from lbzoo.callbacks import layer_stats

    steps: list[int] = []
    original = layer_stats.Measured.before_step

    def spy(self: layer_stats.Measured, loss_scale: float) -> None:
        steps.append(trainer_step[0] + 1)
        original(self, loss_scale)

    trainer_step = [0]

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            trainer_step[0] = trainer.global_step

    monkeypatch.setattr(layer_stats.Measured, "before_step", spy)
    fit(Plain(adamw), TrustRatio(every=5), Count(), accumulate_grad_batches=2)
    assert steps == [1, 5, 10]


def test_layers_are_chosen_by_glob(tmp_path: Path) -> None:
    fit(Plain(adamw), TrustRatio(every=6, layers=("2.*",), values=("update_ratio",)), logger=tensorboard(tmp_path))
    logged = scalars(tmp_path)
    assert {tag for tag in logged if not tag.startswith("summary/")} == {"update_ratio/2.weight", "update_ratio/2.bias"}
    assert logged["summary/trust_ratio_min"]  # summaries stand for the chosen layers, whatever values are chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ("0.wieght",)}, r"no layer matches '0.wieght'; did you mean '0.weight'\?"),
        ({"layers": ("*", "nothing.like.it")}, r"no layer matches 'nothing.like.it'; known: 0.bias"),
        ({"values": ("trust_raito",)}, r"matches 'trust_raito'; did you mean 'trust_ratio'\?"),
    ],
)
def test_a_glob_that_matches_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(Plain(adamw), TrustRatio(**options))


def test_layers_fail_before_the_first_step() -> None:
    module = Plain(fake_layerwise)
    with pytest.raises(UsageError):
        fit(module, TrustRatio(layers=("x",)))
    assert module.trainer.global_step == 0


def test_a_layer_gone_bad_hides_no_other(tmp_path: Path) -> None:
    class Poisoned(Plain):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.model[2].bias.grad.fill_(float("nan"))

    fit(Poisoned(fake_layerwise), TrustRatio(every=1), logger=tensorboard(tmp_path), max_steps=1)
    logged = scalars(tmp_path)
    assert np.isnan(logged["trust_ratio/2.bias"][1])
    assert all(np.isfinite(logged[f"trust_ratio/{layer}"][1]) for layer in LAYERS[:3])
    assert events(tmp_path).Histograms("hist/trust_ratio")[0].histogram_value.num == 3


def test_layers_without_a_gradient_are_left_out(tmp_path: Path) -> None:
    def all_but_frozen(module: nn.Module) -> torch.optim.Optimizer:
        assert isinstance(module, Plain)
        module.model[0].bias.requires_grad_(False)
        return adamw(module)

    fit(Plain(all_but_frozen), TrustRatio(every=1), logger=tensorboard(tmp_path), max_steps=2)
    assert "trust_ratio/0.bias" not in scalars(tmp_path)
    assert "trust_ratio/0.weight" in scalars(tmp_path)


def test_a_step_that_a_scaler_skips_is_not_logged(tmp_path: Path) -> None:
    """What the optimizer says then is of the step before."""

    class Skips(Plain):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            optimizer.found_inf = torch.tensor(float(self.trainer.global_step == 1))  # type: ignore[attr-defined]

    def lamb(module: nn.Module) -> torch.optim.Optimizer:
        return lbzoo.create_optimizer(module, "lamb", lr=0.01)

    fit(Skips(lamb), TrustRatio(every=1), logger=tensorboard(tmp_path), max_steps=4)
    assert list(scalars(tmp_path)["trust_ratio/0.weight"]) == [1, 3, 4]
    others = LayerStats(["0.weight"], {"trust_ratio": torch.ones(1)})
    assert join([LayerStats(), others]) is others, "of several optimizers one may skip"
    assert join([LayerStats(), LayerStats()]).names == []


def test_a_step_of_no_length_has_trust_ratio_one(tmp_path: Path) -> None:
    """As the rules have it where a norm is 0: here the learning rate is."""

    def standing(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.0)

    fit(Plain(standing), TrustRatio(every=1), logger=tensorboard(tmp_path), max_steps=1)
    logged = scalars(tmp_path)
    assert {logged[f"trust_ratio/{layer}"][1] for layer in LAYERS} == {1.0}
    assert {logged[f"update_ratio/{layer}"][1] for layer in LAYERS} == {0.0}


def test_two_optimizers_are_both_watched(tmp_path: Path) -> None:
    class Two(Plain):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [FakeLayerwise(list(self.model[0].named_parameters()), lr=0.1), adamw(self.model[2])]

    fit(Two(adamw), TrustRatio(every=3), logger=tensorboard(tmp_path), max_steps=12)  # six of each
    logged = scalars(tmp_path)
    assert {tag for tag in logged if tag.startswith("trust_ratio/")} == {f"trust_ratio/{layer}" for layer in LAYERS}
    assert set(logged["trust_ratio/0.weight"]) == {2, 6, 12}


def test_wrapped_optimizers_are_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, layerwise = adamw(nn.Linear(2, 2)), fake_layerwise(nn.Linear(2, 2))
    prepared = accelerate.Accelerator(cpu=True).prepare(layerwise)
    assert unwrap(prepared) is layerwise
    assert unwrap(LightningOptimizer(layerwise)) is layerwise
    assert unwrap(LightningOptimizer(plain)) is plain
    assert unwrap(layerwise) is layerwise


def test_names_are_those_of_the_model() -> None:
    assert short_names(["model.conv1.weight", "model.fc.bias"]) == ["conv1.weight", "fc.bias"]
    assert short_names(["module._orig_mod.model.fc.bias"]) == ["fc.bias"]
    assert short_names(["model.w", "w"]) == ["model.w", "w"]  # stripped, two layers would be one
    assert short_names(["model.w", "head.w"]) == ["w", "head.w"]


def test_any_other_logger_gets_the_same_numbers(tmp_path: Path) -> None:
    import csv

    loggers = [tensorboard(tmp_path / "tb"), CSVLogger(str(tmp_path), name="csv", version="")]
    fit(Plain(adamw), TrustRatio(every=4), logger=loggers)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [1, 4, 8, 12]
    for tag, series in scalars(tmp_path / "tb").items():
        assert {step: float(row[tag]) for step, row in rows.items()} == pytest.approx(series, rel=1e-6)


def test_custom_scalar_layout_names_the_parts(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    fit(Plain(adamw), TrustRatio(every=4), logger=tensorboard(tmp_path))
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    titles = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert titles["trust_ratio of each layer"] == ["0", "2"]
    (pattern,) = next(c for c in layout.category if c.title == "trust_ratio of each layer").chart[0].multiline.tag
    assert pattern == r"^trust_ratio/0(\.|$)"
