"""The linear regression task, and its recipe."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lbzoo.engines import fit
from lbzoo.engines.metrics_file import read_metrics
from lbzoo.tasks.linear_regression import LinearRegression


def test_loss_and_gradient_of_the_first_step() -> None:
    task = LinearRegression(input_shape=(3,))
    assert [name for name, _ in task.named_parameters()] == ["model.weight"]
    x, y = torch.randn(8, 3), torch.randn(8)
    loss = task.training_step((x, y), 0)
    loss.backward()
    assert loss.item() == pytest.approx(y.square().mean().item())
    torch.testing.assert_close(task.model.weight.grad[0], -2 * (y[:, None] * x).mean(0))


@pytest.mark.parametrize("optimizer", ["vr_sgd", "sgd"])
def test_the_recipe_finds_the_weights(tmp_path: Path, optimizer: str) -> None:
    overrides = [f"optimizer.name={optimizer}", "trainer.devices=1", "data.num_val=1000", "data.global_batch_size=128"]
    result = fit("vrgd_linear_regression", overrides, scale="mini", runs=tmp_path)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert result.metrics["val/loss"] == pytest.approx(1.0, abs=0.1)
    for index in range(1, 11):
        assert result.metrics[f"val/weight_{index}"] == pytest.approx(index, abs=0.2)
    assert {line["summary/gsnr_gradients"] for line in lines if "summary/gsnr_gradients" in line} == {8}
    assert all(math.isfinite(line.get("summary/noise_scale", 0.0)) for line in lines)
