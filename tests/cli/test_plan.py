"""``lbzoo plan``."""

from __future__ import annotations

import json

import pytest

from lbzoo.cli.fit import ScaleName
from lbzoo.cli.plan import plan

HEADLINE = "resnet50_novograd_32k"


def planned(capsys: pytest.CaptureFixture[str], *overrides: str, **options: object) -> str:
    settings = {"scale": ScaleName.paper, "model": False, "json": False, "plugins": True, **options}
    plan(HEADLINE, list(overrides), **settings)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_as_the_paper_ran_it_and_here(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "trainer.accelerator=cpu", "schedule.warmup_steps=500")
    assert (
        out
        == """\
resnet50_novograd_32k at scale paper
  batch          32,768 = 128 x 8 V100 x 32 accumulated (as the paper ran it)
                 32,768 = 128 x 1 CPU x 256 accumulated (here)
  steps          3,519 = ceil(90 epochs x 1,281,167 / 32,768); 39.10 an epoch
  samples        115,310,592 images: 90.00 epochs of 1,281,167
  virtual shards 256, one a micro-batch, of 5,004 images; 143 more take turns
  learning rate  0.026
  schedule       500 steps of warmup, 3,019 steps of cosine
"""
    )


def test_devices_and_nodes_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "trainer.accelerator=cuda", "trainer.devices=8", "trainer.num_nodes=4")
    assert "32,768 = 128 x 8 " in out
    assert " x 4 nodes x 8 accumulated (here)" in out


def test_the_learning_rates_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "lr_scaling={rule: sqrt, base_global_batch_size: 512}", "optimizer.lr=0.005")
    assert "learning rate  0.04 = 0.005 x sqrt(32,768 / 512)" in out


def test_stages(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, "stages=[{name: a, steps: 10}, {name: b, steps: 2000}]")
    assert "\nstage a\n" in out
    assert "\nstage b\n" in out
    assert out.endswith("\n2 stages, 2,010 steps\n")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(planned(capsys, json=True))
    assert (data["recipe"], data["steps"]) == (HEADLINE, 3519)
    (stage,) = data["stages"]
    assert stage["batches"][0]["accumulation"] == 32
    assert stage["model"] is None


def test_parameters_and_optimizer_memory(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, scale=ScaleName.mini, model=True)
    (parameters,) = [line.split() for line in out.splitlines() if line.startswith("  parameters")]
    (optimizer,) = [line for line in out.splitlines() if line.startswith("  optimizer")]
    assert int(parameters[1].replace(",", "")) > 1_000_000
    assert optimizer.endswith("1.00 x the weights")
