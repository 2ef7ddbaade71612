"""The folder of a run: ``runs/<recipe>/<number>/`` with the recipe, the environment, the logs and the status.

Nothing here imports torch. Only rank 0 writes, apart from :func:`write_rank_failure`.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lbzoo.checkpoint.folder import CheckpointFolder
from lbzoo.errors import CheckpointError, LbzooError

_status_lock = threading.RLock()  # of threads; a signal may come while it is held

State = Literal["running", "finished", "failed", "diverged", "interrupted"]

_PACKAGES = (
    "lbzoo", "torch", "lightning", "accelerate", "torchvision", "torchaudio", "timm", "transformers", "torchrec",
    "torchmetrics", "numpy", "tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints")

    def status(self) -> dict[str, Any]:
        """``status.json``, or {} before the first one was written."""
        return _read_json(self.path / "status.json")

    def write_status(self, state: State, **values: Any) -> None:
        """Replace ``status.json``; values that are not given stay as they were."""
        with _status_lock:  # a checkpoint that is written in the background says so as well
            now = _now()
            here = {"pid": os.getpid(), "host": socket.gethostname()}
            status = {"started": now, **self.status(), "state": state, "updated": now, **here, **values}
            write_json(self.path / "status.json", status)

    def write_recipe(self, text: str) -> None:
        try:
            self.recipe_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise LbzooError(f"cannot write {self.recipe_file}: {error.strerror}") from error

    def write_environment(self, **values: Any) -> None:
        """Add one entry a start (a resumed run has several) to ``environment.json``."""
        file = self.path / "environment.json"
        starts = _read_json(file).get("starts", [])
        write_json(file, {"starts": [*starts, {**environment(), **values}]})

    def rank_failures(self) -> list[dict[str, Any]]:
        """What ranks other than 0 wrote before they died, the earliest first."""
        found = [_read_json(file) for file in self.path.glob("failure_rank*.json")]
        return sorted((failure for failure in found if failure), key=lambda failure: str(failure.get("time")))

    def write_rank_failure(self, rank: int, error: BaseException, exit_code: int) -> None:
        content = {"rank": rank, "error": str(error), "exit_code": exit_code, "time": _now()}
        write_json(self.path / f"failure_rank{rank}.json", content)


def create_run(root: Path, recipe: str) -> RunFolder:
    """A new numbered folder below ``root/recipe``; two processes that start together get different numbers."""
    parent = root / recipe
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max(_numbers(parent), default=0) + 1
        while True:
            try:
                (parent / str(number)).mkdir()
            except FileExistsError:
                number += 1
            else:
                return RunFolder(parent / str(number))
    except OSError as error:
        raise LbzooError(
            f"cannot write the run folder below {parent}: {error.strerror}; choose another with --runs DIR"
        ) from error


def find_unfinished(root: Path, recipe: str, scale: str) -> RunFolder | None:
    """The newest run of a recipe at a scale, if it has a checkpoint and is not finished; else None."""
    parent = root / recipe
    if not parent.is_dir():
        return None
    for number in sorted(_numbers(parent), reverse=True):
        run = RunFolder(parent / str(number))
        status = run.status()
        if status.get("scale", scale) != scale:  # a status.json that a power cut has damaged says nothing
            continue
        if status.get("state") == "finished":
            return None
        if run.checkpoints.steps():  # one that died before its first checkpoint has nothing to give
            return run
    return None


def run_of(path: Path) -> RunFolder:
    """The run folder that a path means: the folder, its ``checkpoints/``, or one of its checkpoints."""
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "recipe.yaml").is_file():
            return RunFolder(folder)
    raise CheckpointError(f"{path} is not in a run folder (no recipe.yaml there or above it)")


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command line of this process."""
    return {
        "time": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": package_versions(),
        "commit": _commit(),
    }


def package_versions() -> dict[str, str]:
    """Of what takes part in a run, as far as it is installed."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that lbzoo runs from, with ``+changes`` where it has any; else None."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _numbers(parent: Path) -> list[int]:
    return [int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at once: it is never there in part. Raises LbzooError where it cannot be written."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise LbzooError(f"cannot write {file}: {error.strerror}") from error
