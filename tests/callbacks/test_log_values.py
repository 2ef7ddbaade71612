"""What is written is read back from the event files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from plain_trainer import events, scalars, tensorboard
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lbzoo.callbacks.log_values import log_histogram, log_image, log_layers, log_layout, log_scalars
from lbzoo.callbacks.trainer_view import TrainerView


class Recorder(Logger):
    """A logger of somebody else's."""

    def __init__(self, skips_layers: bool = False) -> None:
        super().__init__()
        self.skips_layers = skips_layers
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    name, version = "recorder", ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, metrics))


def view(*loggers: Logger, is_global_zero: bool = True) -> TrainerView:
    return cast(TrainerView, SimpleNamespace(loggers=loggers, is_global_zero=is_global_zero))


def test_layers_and_scalars_are_one_event(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    layers = {"a": (["x", "y.z"], torch.tensor([1.5, 2.5])), "b": (["x"], torch.tensor([3.5], dtype=torch.float64))}
    log_layers(view(logger), layers, 7, scalars={"summary/s": 4.5})
    logger.save()
    assert scalars(tmp_path) == {"a/x": {7: 1.5}, "a/y.z": {7: 2.5}, "b/x": {7: 3.5}, "summary/s": {7: 4.5}}
    assert len({events(tmp_path).Scalars(tag)[0].wall_time for tag in scalars(tmp_path)}) == 1


def test_other_loggers_get_a_flat_dictionary() -> None:
    plain, short = Recorder(), Recorder(skips_layers=True)
    log_layers(view(plain, short), {"a": (["x"], torch.tensor([1.5]))}, 7, scalars={"s": 2.0})
    assert plain.logged == [(7, {"s": 2.0, "a/x": 1.5})]
    assert short.logged == [(7, {"s": 2.0})]


def test_a_logger_that_skips_layers_gets_no_empty_call() -> None:
    short = Recorder(skips_layers=True)
    log_layers(view(short), {"a": (["x"], torch.tensor([1.5]))}, 7)
    assert short.logged == []


def test_scalars_take_tensors(tmp_path: Path) -> None:
    recorder, logger = Recorder(), tensorboard(tmp_path)
    log_scalars(view(recorder, logger), {"a": torch.tensor(2.0), "b": 3}, 1)
    logger.save()
    assert recorder.logged == [(1, {"a": 2.0, "b": 3.0})]
    assert scalars(tmp_path) == {"a": {1: 2.0}, "b": {1: 3.0}}


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    recorder, logger = Recorder(), tensorboard(tmp_path / "tb")
    other = view(recorder, logger, is_global_zero=False)
    log_scalars(other, {"a": 1.0}, 1)
    log_layers(other, {"a": (["x"], torch.tensor([1.0]))}, 1)
    log_histogram(other, "h", np.ones(3), 1)
    log_image(other, "i", np.zeros((2, 2, 3), np.uint8), 1)
    log_layout(other, {"c": {"t": ("Multiline", ["a"])}})
    assert recorder.logged == []
    assert not (tmp_path / "tb").exists()


def test_the_loggers_prefix_is_kept(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="", prefix="run.1")
    log_scalars(view(logger), {"a": 1.0}, 1)
    log_layout(view(logger), {"c": {"t": ("Multiline", ["a"]), "m": ("Margin", ["a", "b", "c"])}})
    logger.save()
    assert scalars(tmp_path) == {"run.1-a": {1: 1.0}}
    charts = layouts(tmp_path)[-1]["c"]
    assert list(charts["t"].multiline.tag) == [r"run\.1\-a"]
    assert charts["m"].margin.series[0].value == "run.1-a"


def test_without_torchs_private_method_values_still_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = tensorboard(tmp_path)
    writer = logger.experiment
    file_writer = writer._get_file_writer()

    class Later(SummaryWriter):
        """As a later torch might have it: the method has another name."""

        _get_file_writer = None

        def __init__(self) -> None: ...

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            from torch.utils.tensorboard.summary import scalar

            file_writer.add_summary(scalar(tag, value), step)

    monkeypatch.setattr(logger, "_experiment", Later())
    log_layers(view(logger), {"a": (["x"], torch.tensor([1.5]))}, 7)
    file_writer.flush()
    assert scalars(tmp_path) == {"a/x": {7: 1.5}}


def test_histogram_counts_what_is_finite(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    values = np.array([-0.05, 0.0, 0.04, 0.25, np.nan, np.inf, -np.inf])
    log_histogram(view(logger), "h", values, 3)
    log_histogram(view(logger), "none", np.array([np.nan]), 3)
    logger.save()
    (event,) = events(tmp_path).Histograms("h")
    counted = event.histogram_value
    assert (event.step, counted.num, counted.min, counted.max) == (3, 4, -0.05, 0.25)
    assert counted.sum == pytest.approx(0.24)
    assert counted.bucket_limit == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert counted.bucket == [1, 2, 0, 1]
    assert events(tmp_path).Tags()["histograms"] == ["h"]


def test_layouts_of_several_callbacks_add_up(tmp_path: Path) -> None:
    logger = tensorboard(tmp_path)
    log_layout(view(logger), {"one": {"t": ("Multiline", ["a"])}})
    log_layout(view(logger), {"two": {"t": ("Multiline", ["b"])}, "one": {"u": ("Multiline", ["c"])}})
    logger.save()
    last = layouts(tmp_path)[-1]
    assert {category: sorted(charts) for category, charts in last.items()} == {"one": ["t", "u"], "two": ["t"]}


def test_layouts_of_two_runs_stay_apart(tmp_path: Path) -> None:
    for run in ("one", "two"):
        logger = tensorboard(tmp_path / run)
        log_layout(view(logger), {run: {"t": ("Multiline", ["a"])}})
        logger.save()
    assert list(layouts(tmp_path / "two")[-1]) == ["two"]


def layouts(folder: Path) -> list[dict[str, dict[str, Any]]]:
    found = []
    for event in events(folder).Tensors("custom_scalars__config__"):
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        found.append({category.title: {chart.title: chart for chart in category.chart} for category in layout.category})
    return found
