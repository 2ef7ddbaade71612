"""The hash covers what changes the training, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo.recipe import load_recipe

CHANGES = [
    "seed=7",
    "epochs=4",
    "steps=16",
    "optimizer.lr=0.02",
    "optimizer.betas=[0.95, 0.99]",
    "optimizer.param_rules=[{ndim: 1, weight_decay: 0.1}]",
    "optimizer.name=adamw",
    "schedule.name=polynomial",
    "schedule.warmup_epochs=1",
    "data.global_batch_size=512",
    "data.micro_batch_size=64",
    "data.image_size=64",
    "task.label_smoothing=0.1",
    "trainer.precision=32-true",
    "trainer.gradient_clip_norm=1.0",
]
SAME = [
    "trainer.devices=4",
    "trainer.devices=2 trainer.num_nodes=2",
    "trainer.strategy=ddp",
    "trainer.engine=accelerate",
    "trainer.accelerator=cpu",
    "trainer.num_workers=0",
    "trainer.validate_every.steps=3",
    "callbacks=[]",
    "logging.every=1",
    "logging.loggers=[csv]",
    "checkpoint.keep_last=3",
    "expect.val/top1=0.5",
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_the_training(valid: Path, change: str) -> None:
    assert load_recipe(valid, [change]).hash != load_recipe(valid).hash


@pytest.mark.parametrize("change", SAME)
def test_does_not_change_the_training(valid: Path, change: str) -> None:
    assert load_recipe(valid, change.split(" ")).hash == load_recipe(valid).hash


def test_is_of_what_was_resolved_and_not_of_how_it_was_written(write: Write) -> None:
    plain = load_recipe(write(VALID))
    steps = load_recipe(write(VALID), [f"steps={plain.stages[0].steps}"])
    assert steps.hash == plain.hash
    respelt = VALID.replace("1e-2", "0.010").replace("# lbzoo", "# other").replace("version: 1\n", "") + "version: 1\n"
    assert load_recipe(write(respelt, "other.yaml")).hash == plain.hash


def test_moving_the_data_does_not_change_the_training(write: Write) -> None:
    path = write(VALID.replace("name: digits", "name: imagenet"))
    assert load_recipe(path, ["data.root=/a"]).hash == load_recipe(path, ["data.root=/b"]).hash


def test_is_stable() -> None:
    """A run of an earlier version can be resumed: change the hash only with a reason."""
    from lbzoo.recipe.hashing import training_hash
    from lbzoo.recipe.schema import TrainerSettings

    assert training_hash(42, [], TrainerSettings()) == "f4a7193228c878ca"
