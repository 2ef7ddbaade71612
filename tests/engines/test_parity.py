"""One result on every layout: 20 steps under DDP, FSDP2 and HSDP on 1 to 4 ranks, of both engines, against one device.

Parameters are compared, and what was logged: losses, layer statistics, GSNR. Buffers are not: BatchNorm's running
statistics are averages over ranks of averages over time, which depend on how the micro-batches fall to the ranks.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights

from lbzoo.engines.metrics_file import read_metrics

HEAD = """\
version: 1
seed: 3
steps: 20
schedule: {name: cosine, warmup_steps: 4}
trainer: {accelerator: cpu, gradient_clip_norm: 0.5, validate_every: {steps: 10}}
logging: {every: 5, loggers: [csv]}
"""
RECIPES = {
    "layernorm": """\
task: {name: "parity_tasks:LayerNormNet"}
data: {name: "parity_tasks:Vectors", global_batch_size: 16, micro_batch_size: 4}
optimizer: {name: vr_lamb, lr: 0.01, weight_decay: 0.01, param_rules: [{ndim: 1, weight_decay: 0.0, adapt: false}]}
callbacks: [trust_ratio, gsnr]
""",
    "transformer": """\
task: {name: "parity_tasks:SmallTransformer"}
data: {name: "parity_tasks:Tokens", global_batch_size: 16, micro_batch_size: 4}
optimizer: {name: lamb, lr: 0.01, weight_decay: 0.01}
callbacks: [trust_ratio, {name: noise_scale, every: 10}]
""",
    "resnet": """\
task: {name: image_classification, model: cifar_resnet20, l2_regularization: 0.001}
data: {name: digits, image_size: 8, global_batch_size: 32, micro_batch_size: 8}
optimizer: {name: vr_lamb, lr: 0.01, weight_decay: 0.01}
callbacks: [trust_ratio, gsnr]
""",
}
TOLERANCE = {"layernorm": 1e-6, "transformer": 1e-6, "resnet": 1e-9}
FSDP = ["trainer.strategy=fsdp"]
ACCELERATE = ["trainer.engine=accelerate"]
LAYOUTS = {
    "ddp 2x2": (2, []),
    "ddp 4x1": (4, []),
    "fsdp 1x4": (1, FSDP),
    "fsdp 2x2": (2, FSDP),
    "fsdp 4x1": (4, FSDP),
    "hsdp 2x2x1": (4, [*FSDP, "trainer.fsdp.shard_size=2"]),
    "accelerate 1x4": (1, ACCELERATE),
    "accelerate ddp 2x2": (2, ACCELERATE),
    "accelerate ddp 4x1": (4, ACCELERATE),
    "accelerate fsdp 2x2": (2, [*ACCELERATE, *FSDP]),
    "accelerate fsdp 4x1": (4, [*ACCELERATE, *FSDP]),
}
TIMING = {"time", "summary/samples_per_second"}


class Runs:
    """The run of each recipe on each layout, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[str, str], Path] = {}

    def of(self, recipe: str, layout: str) -> Path:
        if (recipe, layout) not in self._done:
            path = self.folder / f"{recipe}.yaml"
            path.write_text(HEAD + RECIPES[recipe])
            ranks, overrides = LAYOUTS.get(layout, (1, []))
            double = ["trainer.precision=64-true"] if recipe == "resnet" else []
            job = (path, [*overrides, *double], self.folder / layout)
            result = on_ranks(ranks, fit_here, *job)[0]
            assert (result.state, result.step) == ("finished", 20)
            self._done[recipe, layout] = result.run_dir
        return self._done[recipe, layout]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def logged(run: Path) -> dict[tuple[int, str], float]:
    """Everything in the CSV log by (step, tag), layer by layer, without what is measured with a clock."""
    with (run / "csv" / "from_step_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {(int(row["step"]), tag): text for row in rows for tag, text in row.items() if text}
    return {at: float(text) for at, text in values.items() if at[1] not in TIMING | {"step"}}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_result(runs: Runs, recipe: str, layout: str) -> None:
    one, other = saved_weights(runs.of(recipe, "one device")), saved_weights(runs.of(recipe, layout))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=TOLERANCE[recipe], msg=name)
    expected, found = logged(runs.of(recipe, "one device")), logged(runs.of(recipe, layout))
    assert expected.keys() == found.keys()
    assert {tag.partition("/")[0] for _, tag in expected} >= {"train", "summary", "trust_ratio", "update_ratio"}
    for at in expected:
        if recipe == "resnet" and at[1].startswith("val/"):
            continue  # with BatchNorm's buffers
        assert found[at] == pytest.approx(expected[at], rel=1e-3, abs=1e-5), at


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["1x4", "ddp 2x2", "fsdp 4x1"])
def test_both_engines_write_the_same_metrics(runs: Runs, layout: str) -> None:
    lightning = runs.of("layernorm", "one device" if layout == "1x4" else layout)
    accelerate = runs.of("layernorm", f"accelerate {layout}")
    lines = zip(read_metrics(lightning / "metrics.jsonl"), read_metrics(accelerate / "metrics.jsonl"), strict=True)
    for expected, found in lines:
        assert list(found) == list(expected), "in the same order"
        assert found["stage"] == expected["stage"]
        for name in expected.keys() - TIMING - {"stage"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-5), (expected["step"], name)
