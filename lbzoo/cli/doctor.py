"""``lbzoo doctor``: what this installation can do, and what is missing for the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

# Extra of pyproject.toml -> the packages that it stands for.
_EXTRAS = {
    "vision": ("torchvision", "timm", "sklearn", "PIL"),
    "text": ("transformers", "datasets", "tokenizers", "sacrebleu"),
    "audio": ("torchaudio", "soundfile"),
    "dlrm": ("torchrec", "fbgemm_gpu"),
    "accelerate": ("accelerate",),
    "sweep": ("optuna", "matplotlib"),
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Versions, devices, extras and data folders; exit code 1 where something that is installed cannot work."""
    report = {"versions": _versions(), **_devices(), "extras": _extras(), "data": _data()}
    problems = _problems(report)
    if as_json:
        typer.echo(json.dumps({**report, "problems": problems}, indent=1))
        return 1 if problems else 0
    for title, entries in report.items():
        typer.echo(f"{title}:")
        for name, value in entries.items():
            typer.echo(f"  {name:<16} {value}")
    for problem in problems:
        typer.echo(f"problem: {problem}")
    return 1 if problems else 0


def _versions() -> dict[str, str]:
    from lbzoo.engines.run_folder import environment

    now = environment()
    return {"python": now["python"], **now["packages"], "commit": now["commit"] or "installed package"}


def _devices() -> dict[str, dict[str, Any]]:
    import torch

    gpus = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    cpu = {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    return {"devices": {**cpu, **(gpus or {"cuda": f"no GPU (torch was built for CUDA {torch.version.cuda})"})}}


def _extras() -> dict[str, str]:
    found = {}
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found[extra] = f"missing {', '.join(missing)}: pip install 'lbzoo[{extra}]'" if missing else "installed"
    return found


def _data() -> dict[str, str]:
    folders = {name: os.environ.get(name) for name in sorted(os.environ) if name.startswith("LBZOO_")}
    return {
        name: f"{path}{'' if path and os.path.exists(path) else ' (does not exist)'}" for name, path in folders.items()
    }


def _problems(report: dict[str, dict[str, Any]]) -> list[str]:
    problems = []
    torch_version = tuple(int(part) for part in metadata.version("torch").split("+")[0].split(".")[:2])
    if not (2, 11) <= torch_version < (2, 13):
        problems.append(f"torch {metadata.version('torch')} is outside >=2.11,<2.13; see constraints.txt")
    if report["extras"]["dlrm"] == "installed":
        # In a process of its own: it prints warnings as it comes in, and a broken one may crash.
        done = subprocess.run([sys.executable, "-c", "import fbgemm_gpu"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
            advice = "without an NVIDIA driver `make setup` swaps in its CPU build"
            problems.append(f"fbgemm_gpu does not import ({reason}); {advice}")
    return problems
