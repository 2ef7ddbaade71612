"""The checkpoints of one run on disk: names, the ``last`` and ``best`` links, clearing away, and checking for damage.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbzoo.checkpoint.transformers_folder import is_transformers_folder
from lbzoo.errors import CheckpointError

FORMAT = 1
STATE_FILE, CALLBACKS_FILE = "state.json", "callbacks.pt"
_NAME = re.compile(r"step_(\d{8,})$")


@dataclass(frozen=True)
class CheckpointFolder:
    """The ``checkpoints/`` folder of a run. Steps are optimizer steps counted over the whole run."""

    path: Path

    def step_path(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete (unfinished ones carry another name), in order."""
        if not self.path.is_dir():
            return []
        found = (_NAME.match(entry.name) for entry in self.path.iterdir() if not entry.is_symlink())
        return sorted(int(match[1]) for match in found if match)

    def link(self, name: str, step: int) -> None:
        """Point ``last`` or ``best`` at a step; replaced in one move, never missing in between."""
        beside = self.path / f".{name}.{os.getpid()}.tmp"
        beside.unlink(missing_ok=True)
        beside.symlink_to(self.step_path(step).name)
        target = self.path / name
        if target.is_dir() and not target.is_symlink():  # a run that was copied without links: scp, object stores
            shutil.rmtree(target)
        beside.replace(target)

    def linked_step(self, name: str) -> int | None:
        """The step that ``last`` or ``best`` points at."""
        try:
            match = _NAME.match(os.readlink(self.path / name))
        except OSError:
            return None
        return int(match[1]) if match else None

    def clear(self, *, keep_last: int) -> None:
        """Remove what a killed save left, and all but the newest ``keep_last`` checkpoints; ``best`` stays."""
        for entry in self.path.glob("step_*.tmp"):
            shutil.rmtree(entry, ignore_errors=True)
        kept = {self.linked_step("best"), self.linked_step("last"), *self.steps()[-max(keep_last, 1) :]}
        for step in self.steps():
            if step not in kept:
                # Renamed first: a removal that is cut short must not leave a damaged checkpoint under a good name.
                doomed = self.step_path(step).with_suffix(".tmp")
                self.step_path(step).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint whose files are all there in full.

    Raises CheckpointError naming the file that is missing or shorter than it was when it was written.
    """
    state_file = path / STATE_FILE
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        sizes = dict(state["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {STATE_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state_file} is damaged ({error}); take another checkpoint of the run") from None
    for name, size in sizes.items():
        file = path / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            what = "is missing" if there is None else f"has {there:,} of its {size:,} bytes"
            raise CheckpointError(f"{path} is damaged: {name} {what}; take another checkpoint of the run")
    return dict(state)


def validates_averages(path: Path) -> bool:
    """Whether the metrics of a checkpoint are those of its averaged weights; False for other files of weights."""
    if path.is_file() or is_transformers_folder(path):
        return False
    ema = read_state(path).get("ema")
    return isinstance(ema, dict) and bool(ema.get("in_validation"))


def resolve_checkpoint(path: Path, *, prefer: str = "last") -> Path:
    """The checkpoint that a path means: a checkpoint itself, a run folder, or its ``checkpoints/`` folder.

    A model that transformers saved is one as well, of weights alone.

    ``prefer`` is the link followed in a run folder (``last`` or ``best``; ``last`` where there is no ``best``).
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (path / STATE_FILE).is_file() or is_transformers_folder(path):
        return path.resolve()
    for folder in (path / "checkpoints", path):
        for name in (prefer, "last"):
            if (folder / name / STATE_FILE).is_file():
                return (folder / name).resolve()
        steps = CheckpointFolder(folder).steps()
        if steps:
            return CheckpointFolder(folder).step_path(steps[-1])
    raise CheckpointError(f"{path} holds no checkpoint: neither {STATE_FILE} nor checkpoints/step_*")
