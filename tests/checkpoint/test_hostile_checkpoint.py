"""A checkpoint from somewhere else runs nothing, wherever in it the code is hidden."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lbzoo.checkpoint import load_callbacks, load_checkpoint, load_optimizer, load_weights, save_checkpoint
from lbzoo.errors import CheckpointError


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000001"
    save_checkpoint(path, *make(), {"step": 1}, callbacks={"A": {"x": torch.ones(2), "names": ["a"], "none": None}})
    return path


def announce(path: Path) -> None:
    """Have state.json tell the sizes that the files have now, as whoever writes a hostile checkpoint would."""
    file = path / "state.json"
    state = json.loads(file.read_text())
    state["files"] = {name: (path / name).stat().st_size for name in state["files"]}
    file.write_text(json.dumps(state))


LOADS: dict[str, Callable[[Path], object]] = {
    "resume": lambda path: load_checkpoint(path, *make()),
    "weights": lambda path: load_weights(path, make()[0]),
    "averages": lambda path: load_weights(path, make()[0], averaged=True),
    "optimizer": lambda path: load_optimizer(path, *make()),
}


@pytest.mark.parametrize("load", LOADS)
def test_in_the_table_of_contents(saved: Path, tmp_path: Path, load: str) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "was here")))
    announce(saved)
    with pytest.raises(CheckpointError, match=r"names (posix|nt)\.mkdir"):
        LOADS[load](saved)
    assert not (tmp_path / "was here").exists()


def test_in_a_value(saved: Path, tmp_path: Path) -> None:
    """An option of a parameter group is kept as a pickle of its own."""
    shutil.rmtree(saved)
    model, optimizer = make()
    optimizer.param_groups[0]["note"] = Evil(tmp_path / "was here")
    save_checkpoint(saved, model, optimizer, {"step": 1})
    model, optimizer = make()
    optimizer.param_groups[0]["note"] = "none"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(saved, model, optimizer)
    assert not (tmp_path / "was here").exists()


def test_in_the_callbacks_state(saved: Path, tmp_path: Path) -> None:
    assert load_callbacks(saved)["A"]["names"] == ["a"]
    torch.save({"A": Evil(tmp_path / "was here")}, saved / "callbacks.pt")
    announce(saved)
    with pytest.raises(CheckpointError, match=r"callbacks\.pt cannot be read"):
        load_callbacks(saved)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_in_a_file_of_weights(tmp_path: Path, suffix: str) -> None:
    """What ``--init-from`` takes."""
    file = tmp_path / f"weights{suffix}"
    torch.save({"weight": Evil(tmp_path / "was here")}, file)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_weights(file, make()[0])
    assert not (tmp_path / "was here").exists()


def test_a_file_outside_of_it(saved: Path, tmp_path: Path) -> None:
    """The table of contents names no other folder's files."""
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    announce(saved)
    with pytest.raises(CheckpointError, match="a file outside of it"):
        load_weights(saved, make()[0])
