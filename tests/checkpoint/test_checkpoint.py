"""The checkpoint format: whole or not there, right for another object, and clear about what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from lbzoo.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_weights,
    read_state,
    resolve_checkpoint,
    save_checkpoint,
)
from lbzoo.checkpoint.folder import STATE_FILE
from lbzoo.errors import CheckpointError


def make(width: int = 4, seed: int = 0) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Sequential, torch.optim.Optimizer]:
    model, optimizer = make()
    train(model, optimizer, 3, seed=1)
    path = CheckpointFolder(tmp_path).step_path(3)
    save_checkpoint(path, model, optimizer, {"step": 3, "stage": "main"})
    return path, model, optimizer


def test_training_goes_on_as_if_nothing_had_happened(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer]) -> None:
    path, model, optimizer = saved
    again, other = make(seed=7)
    state = load_checkpoint(path, again, other)
    assert state["step"] == 3
    assert state["stage"] == "main"
    train(model, optimizer, 4, seed=2)
    train(again, other, 4, seed=2)
    for (name, expected), actual in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


def test_group_options_come_back(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer]) -> None:
    path, _, _ = saved
    model, optimizer = make(seed=7)
    for group in optimizer.param_groups:
        group["lr"] = 123.0
    load_checkpoint(path, model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_weights_alone(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer], tmp_path: Path) -> None:
    path, model, _ = saved
    again, _ = make(seed=7)
    load_weights(path, again)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    third, _ = make(seed=8)
    load_weights(tmp_path / "weights.pt", third)
    assert torch.equal(third[0].weight, model[0].weight)


def test_another_model_is_named(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer]) -> None:
    with pytest.raises(CheckpointError, match=r"another model.*'0\.bias' is \[4\], this model's is \[5\]"):
        load_checkpoint(saved[0], *make(width=5))
    wider = nn.Sequential(*make()[0], nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"2 entries differ: '3\.bias' is missing"):
        load_checkpoint(saved[0], wider, torch.optim.AdamW(wider.parameters()))


@pytest.mark.parametrize("as_file", [False, True])
def test_another_head_on_the_same_network(
    saved: tuple[Path, nn.Sequential, torch.optim.Optimizer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    as_file: bool,
) -> None:
    path, model, _ = saved
    if as_file:
        path = tmp_path / "weights.pt"
        torch.save(model.state_dict(), path)
    body = make(seed=7)[0][:2]
    other = nn.Sequential(*body, nn.Linear(4, 5), nn.Linear(5, 5))
    head = other[2].weight.clone()
    with pytest.raises(CheckpointError, match="another model"):
        load_weights(path, other)
    with caplog.at_level(logging.WARNING):
        load_weights(path, other, shared=("0.", "1."))
    taken, given = body.state_dict(), model[:2].state_dict()
    assert all(torch.equal(taken[name], given[name]) for name in given)
    assert torch.equal(other[2].weight, head)
    assert "4 weights are new here, the first is 2.bias" in caplog.text
    assert "2 weights are left out, the first is 2.bias" in caplog.text
    with pytest.raises(CheckpointError, match=r"another model.*'0\.bias' is \[4\], this model's is \[5\]"):
        load_weights(path, nn.Sequential(*make(width=5)[0][:2]), shared=("0.", "1."))
    deeper = nn.Sequential(*make()[0], nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"2 entries differ: '3\.bias' is missing"):
        load_weights(path, deeper, shared=("0.", "1.", "3."))


def test_another_optimizer_is_named(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer]) -> None:
    model, _ = make()
    with pytest.raises(CheckpointError, match=r"momentum_buffer.*another optimizer.*--init-from"):
        load_checkpoint(saved[0], model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def test_a_file_cut_short_is_named(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer]) -> None:
    file = next(saved[0].glob("*.distcp"))
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size // 2)
    with pytest.raises(CheckpointError, match=rf"{file.name} has {size // 2:,} of its {size:,} bytes"):
        load_checkpoint(saved[0], *make())
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
        load_weights(saved[0], make()[0])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "null"])
def test_a_damaged_state_file(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer], text: str) -> None:
    (saved[0] / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_state(saved[0])


def test_a_format_of_the_future(saved: tuple[Path, nn.Sequential, torch.optim.Optimizer]) -> None:
    file = saved[0] / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(saved[0], *make())


def test_weights_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"not a tensor in sight")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_weights(tmp_path / "w.pt", make()[0])


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while writing: the earlier checkpoint stays, and nothing half-done has a good name."""
    folder = CheckpointFolder(tmp_path)
    model, optimizer = make()
    save_checkpoint(folder.step_path(1), model, optimizer, {"step": 1})
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"step_00000002 could not be written.*No space left"):
        save_checkpoint(folder.step_path(2), model, optimizer, {"step": 2})
    monkeypatch.undo()
    assert folder.steps() == [1]
    assert load_checkpoint(folder.step_path(1), *make())["step"] == 1
    folder.clear(keep_last=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000001"]


def test_the_folder_keeps_the_newest_the_best_and_the_linked(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3, 4):
        folder.step_path(step).mkdir()
        (folder.step_path(step) / "state.json").write_text('{"files": {}}')
    folder.link("best", 2)
    folder.link("last", 4)
    folder.link("last", 4)
    folder.clear(keep_last=1)
    assert folder.steps() == [2, 4]
    assert folder.linked_step("best") == 2
    assert resolve_checkpoint(tmp_path).name == "step_00000004"
    assert resolve_checkpoint(tmp_path, prefer="best").name == "step_00000002"
    assert resolve_checkpoint(tmp_path / "step_00000002").name == "step_00000002"


def test_a_link_that_was_copied_as_a_folder(tmp_path: Path) -> None:
    """As scp does, and stores without links."""
    folder = CheckpointFolder(tmp_path)
    for name in ("step_00000002", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_FILE).write_text("{}")
    folder.link("last", 2)
    assert folder.linked_step("last") == 2


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
