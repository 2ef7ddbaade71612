from __future__ import annotations

import pytest

from lbzoo.engines import launch
from lbzoo.engines.launch import World, check_launchable, find_world
from lbzoo.errors import UsageError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
}


def test_alone_on_a_cpu() -> None:
    world = find_world(accelerator="cpu", variables={})
    assert world == World("cpu", 1, 1)
    assert world.in_process


def test_more_devices_are_launched() -> None:
    world = find_world(accelerator="cpu", devices=4, variables={})
    assert world.world_size == 4
    assert not world.in_process
    check_launchable(world)


def test_torchrun_and_slurm_are_honoured() -> None:
    assert find_world(accelerator="cpu", variables=TORCHRUN) == World("cpu", 4, 2, 5, 1, "torchrun")
    assert find_world(accelerator="cpu", variables=SLURM) == World("cpu", 8, 2, 9, 1, "slurm")
    assert find_world(accelerator="cpu", devices=4, num_nodes=2, variables=TORCHRUN).in_process


def test_a_slurm_job_of_one_task_starts_its_own_processes() -> None:
    world = find_world(accelerator="cpu", devices=4, variables={**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert world.launched_by is None
    assert world.world_size == 4


def test_a_batch_script_without_srun() -> None:
    with pytest.raises(UsageError, match="16 tasks: start it with srun"):
        find_world(accelerator="cpu", variables={k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"})


def test_an_interactive_slurm_shell_is_not_a_launch() -> None:
    assert find_world(accelerator="cpu", variables={**SLURM, "SLURM_JOB_NAME": "bash"}).launched_by is None


@pytest.mark.parametrize(("devices", "num_nodes"), [(8, 2), (4, 3), (1, 1)])
def test_a_recipe_against_its_launcher(devices: int, num_nodes: int) -> None:
    with pytest.raises(UsageError, match="torchrun started 4 processes on each of 2 nodes"):
        find_world(accelerator="cpu", devices=devices, num_nodes=num_nodes, variables=TORCHRUN)


def test_devices_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpu_count", lambda accelerator: 2)
    assert find_world(variables={}) == World("cuda", 2, 1)
    with pytest.raises(UsageError, match=r"trainer\.devices is 4, but this machine has 2 GPUs"):
        find_world(devices=4, variables={})


def test_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="torch finds no GPU"):
        find_world(accelerator="cuda", variables={})


def test_several_nodes_need_a_launcher() -> None:
    with pytest.raises(UsageError, match=r"srun[\s\S]*torchrun --nnodes=3 --nproc-per-node=2"):
        check_launchable(World("cpu", 2, 3))
