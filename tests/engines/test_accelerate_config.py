"""What ``accelerate launch`` says against the recipe: every contradiction is named with both sides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lbzoo.engines import accelerate_config
from lbzoo.engines.accelerate_config import check_accelerate
from lbzoo.errors import UsageError
from lbzoo.recipe.schema import TrainerSettings

PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}
RECOMPUTE = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: {precision}
num_machines: 1
num_processes: {processes}
use_cpu: true
"""
RECIPE = """\
version: 1
task: {name: image_classification, model: cifar_resnet20}
data: {name: digits, global_batch_size: 32, micro_batch_size: 16, image_size: 8}
optimizer: {name: lamb, lr: 0.01}
steps: 2
logging: {loggers: []}
"""


@pytest.mark.parametrize(
    ("trainer", "variables"),
    [
        ({}, {}),
        ({}, PLAIN),
        ({"precision": "64-true"}, PLAIN),
        ({"precision": "bf16-mixed"}, PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ({"strategy": "fsdp"}, PLAIN | FSDP2),
        ({"compile": True}, PLAIN | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}),
        (
            {"strategy": "fsdp", "activation_checkpointing": True},
            PLAIN | FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        ),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}),  # left in a shell, not said by accelerate launch
    ],
)
def test_agreement(trainer: dict[str, object], variables: dict[str, str]) -> None:
    check_accelerate(TrainerSettings(**trainer), on_gpu=True, variables=variables)  # type: ignore[arg-type]  # of a table


@pytest.mark.parametrize(
    ("trainer", "variables", "message"),
    [
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            r"mixed_precision=bf16, the recipe trainer\.precision=32-true: .*--mixed_precision no, or "
            r"trainer\.precision=bf16-mixed",
        ),
        (
            {"precision": "bf16-mixed"},
            {},
            r"mixed_precision=no \(which it takes where nothing .*--mixed_precision bf16, or trainer\.precision=32",
        ),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, r"mixed_precision=fp8, .*--mixed_precision no$"),
        ({}, FSDP2, r"says FSDP, the recipe trainer\.strategy=auto: set trainer\.strategy=fsdp"),
        ({"strategy": "fsdp"}, FSDP2 | {"FSDP_VERSION": "1"}, r"fsdp_version=1, lbzoo shards with FSDP2"),
        ({"strategy": "fsdp"}, {"ACCELERATE_USE_FSDP": "true"}, r"fsdp_version=1"),
        ({"strategy": "fsdp"}, FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, r"fsdp_offload_params"),
        (
            {"strategy": "fsdp"},
            FSDP2 | RECOMPUTE,
            r"fsdp_activation_checkpointing=true, the recipe trainer\.activation_checkpointing=false",
        ),
        ({"strategy": "fsdp"}, {}, r"says no FSDP, the recipe trainer\.strategy=fsdp: .*--use_fsdp --fsdp_version 2"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, r"set up for DeepSpeed"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, r"set up for Megatron-LM"),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"dynamo_backend=inductor, the recipe trainer\.compile=false"),
        ({"compile": True}, {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, r"dynamo_backend=eager"),
        ({"accelerator": "cuda"}, {"ACCELERATE_USE_CPU": "True"}, r"use_cpu, the recipe trainer\.accelerator=cuda"),
    ],
)
def test_contradiction(trainer: dict[str, object], variables: dict[str, str], message: str) -> None:
    settings = TrainerSettings(**trainer)  # type: ignore[arg-type]  # of a table
    with pytest.raises(UsageError, match=r"accelerate launch contradicts the recipe:\n  - it .*" + message) as caught:
        check_accelerate(settings, on_gpu=True, variables=PLAIN | variables)
    assert str(caught.value).count("\n") == 1


def test_all_contradictions_at_once() -> None:
    variables = FSDP2 | {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    with pytest.raises(UsageError) as caught:
        check_accelerate(TrainerSettings(), on_gpu=True, variables=variables)
    assert str(caught.value).count("\n  - ") == 3


def test_on_a_cpu_accelerate_cannot_say_fsdp() -> None:
    check_accelerate(TrainerSettings(strategy="fsdp"), on_gpu=False, variables=PLAIN)


def test_accelerate_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate_config, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lbzoo\[accelerate\]', or use lightning"):
        check_accelerate(TrainerSettings(engine="accelerate"), on_gpu=False, variables={})
    check_accelerate(TrainerSettings(), on_gpu=False, variables={})


def accelerate_launch(folder: Path, *overrides: str, precision: str = "'no'", processes: int = 1) -> tuple[int, str]:
    """The exit code and the words of a run that the real ``accelerate launch`` starts from a config file."""
    config, recipe = folder / "config.yaml", folder / "tiny.yaml"
    config.write_text(CONFIG.format(precision=precision, processes=processes))
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "lbzoo", "fit",
               str(recipe), "--runs", str(folder / "runs"), *overrides]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_under_the_real_accelerate_launch(tmp_path: Path) -> None:
    code, text = accelerate_launch(
        tmp_path, "trainer.engine=accelerate", "trainer.precision=bf16-mixed", precision="bf16"
    )
    assert (code, "finished at step 2" in text) == (0, True), text


def test_a_config_file_that_contradicts_the_recipe(tmp_path: Path) -> None:
    code, text = accelerate_launch(tmp_path, "trainer.engine=accelerate", precision="fp16", processes=1)
    assert code != 0
    assert "it says mixed_precision=fp16, the recipe trainer.precision=32-true" in text
    assert not (tmp_path / "runs").exists()


def test_two_processes_on_a_cpu_of_which_accelerate_starts_one(tmp_path: Path) -> None:
    code, text = accelerate_launch(tmp_path, "trainer.engine=lightning", processes=2)
    assert code != 0
    assert "was asked for several processes and has started one" in text
