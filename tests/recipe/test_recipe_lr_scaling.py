"""LAMB's tables 4 and 5: every column from one recipe, tuned at batch 512, by ``lr_scaling``."""

from __future__ import annotations

import pytest
from valid_recipe import Write

from lbzoo.papers import find_rows
from lbzoo.recipe import build_schedule, load_recipe

IMAGENET = """\
version: 1
task: {name: image_classification, model: resnet50}
data: {name: imagenet, global_batch_size: 512, micro_batch_size: 64}
optimizer: {name: lamb, lr: 0.005}
schedule: {name: polynomial, warmup_epochs: 0.3125}
lr_scaling: {rule: sqrt, base_global_batch_size: 512}
epochs: 90
"""
# As many samples as BERT's pre-training sees in all; an epoch of them is the run.
SEQUENCES = """\
version: 1
task: {name: image_classification, model: resnet50}
data: {name: synthetic_images, num_train: 512000000, global_batch_size: 512, micro_batch_size: 32}
optimizer: {name: lamb, lr: 0.000625}
schedule: {name: polynomial, warmup_ratio: 0.003125}
lr_scaling: {rule: sqrt, base_global_batch_size: 512}
epochs: 1
"""


@pytest.mark.parametrize("row", find_rows("lamb/5"), ids=lambda row: str(row["batch_size"]))
def test_table_5(write: Write, row: dict[str, float]) -> None:
    (stage,) = load_recipe(write(IMAGENET), [f"data.global_batch_size={row['batch_size']}"]).stages
    assert stage.optimizer.options["lr"] == pytest.approx(row["lr"], rel=1e-11)
    assert stage.schedule.warmup_epochs == pytest.approx(row["warmup_epochs"])
    assert stage.epochs == row["epochs"]


@pytest.mark.parametrize("row", find_rows("lamb/4"), ids=lambda row: str(row["batch_size"]))
def test_table_4(write: Write, row: dict[str, float]) -> None:
    (stage,) = load_recipe(write(SEQUENCES), [f"data.global_batch_size={row['batch_size']}"]).stages
    assert stage.optimizer.options["lr"] == pytest.approx(row["lr"], rel=1e-11)
    assert stage.schedule.warmup_ratio == pytest.approx(row["warmup_ratio"])
    assert stage.steps == 512_000_000 // row["batch_size"]
    assert build_schedule(stage).warmup_steps == 3125, "the same number of steps at every batch size (4.3)"


@pytest.mark.parametrize("batch", [2048, 8192])
def test_warmup_epochs_may_stay(write: Write, batch: int) -> None:
    """Goyal et al. 2017: 0.1 for each 256, and 5 epochs of warmup at every batch size."""
    words = [
        f"data.global_batch_size={batch}",
        "optimizer={name: momentum, lr: 0.1}",
        "schedule.warmup_epochs=5",
        "lr_scaling={rule: linear, base_global_batch_size: 256, warmup: keep}",
    ]
    (stage,) = load_recipe(write(IMAGENET), words).stages
    assert stage.optimizer.options["lr"] == pytest.approx(0.1 * batch / 256)
    assert stage.schedule.warmup_epochs == 5
