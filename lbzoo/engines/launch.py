"""Who starts the processes of a run, and how many.

Under torchrun, SLURM or ``accelerate launch`` the run is in process: the variables those set are honoured, and a recipe
that contradicts them is an error. Otherwise more than one device makes ``lbzoo`` start ``torch.distributed.run`` itself
(:func:`launch_workers`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from lbzoo.engines.accelerate_config import asked_for_several, is_accelerate_launch, wants_cpu
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import UsageError
from lbzoo.recipe.schema import RequeueSignal, TrainerSettings

RUN_FOLDER_VARIABLE = "LBZOO_RUN_FOLDER"  # set by launch_workers for the processes it starts

Launcher = Literal["torchrun", "slurm", "accelerate"]


@dataclass(frozen=True)
class World:
    """The processes of a run. ``launched_by`` is None where this process has to start them itself."""

    accelerator: Literal["cpu", "cuda"]
    devices: int  # processes on this node
    num_nodes: int
    rank: int = 0
    local_rank: int = 0
    launched_by: Launcher | None = None

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def in_process(self) -> bool:
        """Whether this process is one of the run's, not the one that starts them."""
        return self.launched_by is not None or self.world_size == 1


def find_world(
    *,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = "auto",
    num_nodes: int = 1,
    variables: Mapping[str, str] = os.environ,
) -> World:
    """The world that the recipe's ``trainer`` and the launcher's variables make together.

    Raises UsageError where devices are asked for that do not exist, or where recipe and launcher disagree.
    """
    if accelerator == "auto" and wants_cpu(variables):
        accelerator = "cpu"
    gpus = _gpu_count(accelerator)
    kind: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    launched = _launched_by(variables)
    if launched is None:
        count = (gpus or 1) if devices == "auto" else devices
        _check_devices(count, gpus, kind)
        return World(kind, count, num_nodes)
    if launched != "slurm":  # accelerate launch starts one process without torchrun's variables
        size, rank = int(variables.get("WORLD_SIZE", "1")), int(variables.get("RANK", "0"))
        local_rank = int(variables.get("LOCAL_RANK", "0"))
        local_size = int(variables.get("LOCAL_WORLD_SIZE", size))
    else:
        size, rank = int(variables["SLURM_NTASKS"]), int(variables["SLURM_PROCID"])
        local_rank = int(variables.get("SLURM_LOCALID", "0"))
        local_size = size // int(variables.get("SLURM_NNODES", variables.get("SLURM_JOB_NUM_NODES", "1")))
    nodes = max(size // max(local_size, 1), 1)
    _check_devices(local_size, gpus, kind)
    asked = devices if devices != "auto" else None
    if (asked is not None and asked != local_size) or (num_nodes != 1 and num_nodes != nodes):
        raise UsageError(
            f"the recipe asks for trainer.devices={devices} on trainer.num_nodes={num_nodes}, but "
            f"{_COMMANDS[launched]} started {local_size} process{'es' * (local_size != 1)} on each of {nodes} "
            f"node{'s' * (nodes != 1)}; set them alike, or trainer.devices=auto"
        )
    return World(kind, local_size, nodes, rank, local_rank, launched)


def check_launchable(world: World) -> None:
    """Raise UsageError where this process cannot start the world: several nodes need a launcher on each."""
    if not world.in_process and world.num_nodes > 1:
        raise UsageError(
            f"trainer.num_nodes is {world.num_nodes}: start the run on every node, under SLURM with srun "
            f"(one task a device) or with\n  torchrun --nnodes={world.num_nodes} --nproc-per-node={world.devices} "
            "--rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 -m lbzoo fit RECIPE ..."
        )


def check_trainer(settings: TrainerSettings, world: World) -> None:
    """Raise UsageError for what the recipe's ``trainer`` asks for and this world cannot give."""
    if settings.precision == "16-mixed" and world.accelerator == "cpu":
        raise UsageError("trainer.precision: 16-mixed needs a GPU (Lightning would take bf16-mixed instead); "
                         "on a CPU use bf16-mixed or 32-true")  # fmt: skip
    size = settings.fsdp.shard_size if settings.fsdp else None
    if size is None:
        return
    fitting = [n for n in range(2, world.world_size + 1) if world.world_size % n == 0]
    if size not in fitting:
        choices = f"one of {', '.join(map(str, fitting))}, or" if fitting else "more devices, or"
        why = "is strategy: ddp" if size == 1 else f"does not divide the {world.world_size} devices of the run"
        raise UsageError(f"trainer.fsdp.shard_size: {size} {why}; use {choices} leave it out to shard over all devices")


def launch_workers(
    world: World, arguments: Sequence[str], run: RunFolder, requeue_signal: RequeueSignal = "SIGUSR1"
) -> int:
    """Start ``world.devices`` processes of ``python -m lbzoo ARGUMENTS`` on this node and wait; returns the exit code.

    torchrun's own exit status turns every code into 1, so the code comes from what the ranks wrote. The agent runs in
    a session of its own: a Ctrl-C of the terminal reaches this process alone, which passes it on once.
    """
    forwarded = stop_signals(requeue_signal)
    command = [
        sys.executable, "-m", "lbzoo.engines.agent", "--standalone", f"--nproc-per-node={world.devices}",
        f"--signals_to_handle={','.join(signum.name for signum in forwarded)}", "-m", "lbzoo", *arguments,
    ]  # fmt: skip
    variables = {**os.environ, RUN_FOLDER_VARIABLE: str(run.path)}
    # torchrun passes a signal on to the workers, waits this long, and kills: a large checkpoint needs its time.
    variables.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    # torchrun sets 1 and says so in a box of asterisks; a share of the cores serves CPU runs better.
    variables.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world.devices, 1)))
    if world.accelerator == "cpu" and sys.platform == "linux":
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node: no need for a resolvable host name
    agent = subprocess.Popen(command, env=variables, start_new_session=True)

    asked: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        asked.append(signum)
        if agent.poll() is None:
            agent.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in forwarded}
    try:
        agent_code = agent.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if agent.poll() is None:
            agent.kill()  # the workers are told by the kernel (die_with_parent)
    return _exit_code(run, agent_code, asked[0] if asked else None)


def stop_signals(requeue_signal: RequeueSignal) -> tuple[signal.Signals, ...]:
    """Those that a run saves for and leaves."""
    return signal.SIGINT, signal.SIGTERM, signal.Signals[requeue_signal]


def die_with_parent(signum: int) -> None:
    """Ask the kernel for ``signum`` when the parent dies, so that a killed launcher leaves no workers (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG


def _exit_code(run: RunFolder, agent_code: int, asked: int | None = None) -> int:
    """Of a run whose processes have ended; ``asked``: the first signal that they were sent."""
    failures = run.rank_failures()
    status = run.status()
    if asked is not None and status.get("state") in (None, "running"):  # before they listened to it
        run.write_status("interrupted", exit_code=128 + asked, error=f"stopped by {signal.Signals(asked).name}")
        return 128 + asked
    if failures and status.get("state") != "finished":
        # Rank 0 was then only told to stop because another rank had died.
        first = failures[0]
        run.write_status("failed", exit_code=first["exit_code"], error=f"rank {first['rank']}: {first['error']}")
        return int(first["exit_code"])
    if status.get("state") in (None, "running"):
        run.write_status("failed", exit_code=1, error="the processes of the run died without a word")
        return 1
    return int(status.get("exit_code", 1 if agent_code else 0))


_COMMANDS: Mapping[Launcher, str] = {"torchrun": "torchrun", "slurm": "slurm", "accelerate": "accelerate launch"}


def _launched_by(variables: Mapping[str, str]) -> Launcher | None:
    """Raises UsageError where several processes were started that know nothing of each other.

    Each would take itself for the only one, rank 0 of 1, and train the whole run.
    """
    tasks = _slurm_tasks(variables)
    if "RANK" in variables and "WORLD_SIZE" in variables:
        # torchrun counts its agents; by hand each task is a rank.
        found = int(variables.get("GROUP_WORLD_SIZE", variables["WORLD_SIZE"]))
        if tasks > found and "SLURM_STEP_ID" in variables:
            raise UsageError(
                f"srun started {tasks} tasks, but here rank is {variables['RANK']} of {variables['WORLD_SIZE']} from "
                f"{found} of them: they did not find each other. Start lbzoo itself with srun, or torchrun with "
                f"--nnodes={tasks} and one --rdzv-endpoint for all"
            )
        return "accelerate" if is_accelerate_launch(variables) else "torchrun"
    if int(variables.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"WORLD_SIZE is {variables['WORLD_SIZE']}, but RANK is not set: this process would be alone")
    if tasks > 1:
        if "SLURM_STEP_ID" not in variables:
            # The batch script itself, of which there is one: it would wait for the others for ever.
            raise UsageError(f"this SLURM job has {tasks} tasks: start it with srun lbzoo fit ...")
        return "slurm"  # a job of one task starts its processes itself
    of_mpi = max(int(variables.get(name, "1")) for name in _MPI_SIZES)
    if of_mpi > 1:
        raise UsageError(
            f"mpirun started {of_mpi} processes, which cannot find each other by its variables: use torchrun, srun or "
            "accelerate launch without a hostfile"
        )
    if asked_for_several(variables):
        raise UsageError(
            "accelerate launch was asked for several processes and has started one, as it does on a CPU: leave it out "
            "and set trainer.devices=N, or use torchrun, or add --num_processes 1 (where MASTER_ADDR is set for other "
            "reasons: unset it)"
        )
    return "accelerate" if is_accelerate_launch(variables) else None


_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def _slurm_tasks(variables: Mapping[str, str]) -> int:
    """The tasks of a SLURM job; 1 in an interactive shell, whose variables say what it could start."""
    interactive = variables.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 1 if interactive else int(variables.get("SLURM_NTASKS", "1"))


def _gpu_count(accelerator: str) -> int:
    if accelerator == "cpu":
        return 0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "cuda" and not count:
        raise UsageError("trainer.accelerator is cuda, but torch finds no GPU; use cpu or auto, or see `lbzoo doctor`")
    return count


def _check_devices(count: int, gpus: int, kind: str) -> None:
    if kind == "cuda" and count > gpus:
        raise UsageError(
            f"trainer.devices is {count}, but this machine has {gpus} GPU{'s' * (gpus != 1)}; "
            f"set trainer.devices={gpus} or auto"
        )
