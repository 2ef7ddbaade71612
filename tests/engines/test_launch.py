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


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}


def test_accelerate_launch_is_honoured() -> None:
    assert find_world(accelerator="cpu", variables=ACCELERATE) == World("cpu", 1, 1, 0, 0, "accelerate")
    assert find_world(accelerator="cpu", variables=TORCHRUN | ACCELERATE) == World("cpu", 4, 2, 5, 1, "accelerate")


def test_its_use_cpu_decides_what_the_recipe_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpu_count", lambda accelerator: 0 if accelerator == "cpu" else 2)
    assert find_world(variables=ACCELERATE | {"ACCELERATE_USE_CPU": "True"}).accelerator == "cpu"
    assert find_world(variables=ACCELERATE | {"ACCELERATE_USE_CPU": "False"}).accelerator == "cuda"
    assert find_world(accelerator="cuda", variables=ACCELERATE | {"ACCELERATE_USE_CPU": "True"}).accelerator == "cuda"


def test_a_recipe_for_more_devices_than_accelerate_launch_started() -> None:
    message = r"trainer\.devices=4 on .*, but accelerate launch started 1 process on each of 1 node;"
    with pytest.raises(UsageError, match=message):
        find_world(accelerator="cpu", devices=4, variables=ACCELERATE)


MEETING_POINT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
IN_A_STEP = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
EIGHT_ALONE = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param(ACCELERATE | MEETING_POINT, "asked for several .* has started one", id="accelerate on a CPU"),
        pytest.param(IN_A_STEP | ALONE, "srun started 2 tasks, but here rank is 0 of 1", id="two rank 0 of 1"),
        pytest.param(IN_A_STEP | EIGHT_ALONE, "rank is 3 of 8 from 1 of them", id="a torchrun each, not joined"),
        pytest.param({"WORLD_SIZE": "2"}, "RANK is not set", id="half of the variables"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 4", id="mpirun"),
        pytest.param(ACCELERATE | MEETING_POINT | {"PMI_SIZE": "4"}, "mpirun started 4", id="accelerate with mpirun"),
    ],
)
def test_processes_that_did_not_find_each_other(variables: dict[str, str], message: str) -> None:
    """Each would be rank 0 of 1 and train the whole run."""
    with pytest.raises(UsageError, match=message):
        find_world(accelerator="cpu", variables=variables)


def test_one_torchrun_a_node_under_srun() -> None:
    joined = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    assert find_world(accelerator="cpu", variables=IN_A_STEP | joined) == World("cpu", 8, 2, 9, 1, "torchrun")


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
