"""A disk that fills up while a checkpoint is written: whatever fails, on whichever rank, no half of one has a name."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import disk_jobs
import pytest
import torch
from distributed import on_ranks
from torch import nn

from lbzoo.checkpoint import BackgroundSaver, CheckpointFolder, content_of, load_checkpoint, save_checkpoint, write
from lbzoo.errors import CheckpointError


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def save(folder: CheckpointFolder, step: int) -> None:
    """As a run does: the checkpoint, then the links, then older ones go."""

    def then() -> None:
        folder.link("last", step)
        folder.clear(keep_last=1)

    write(folder.step_path(step), content_of(*make(), {"step": step}, callbacks={"A": {"x": 1}}), then=then)


def assert_all_whole(folder: CheckpointFolder) -> None:
    for step in folder.steps():
        assert load_checkpoint(folder.step_path(step), *make(seed=9))["step"] == step


def test_every_write_fails_in_turn(tmp_path: Path) -> None:
    """After each failure the earlier checkpoint is whole; in the end there is room again, and the save succeeds."""
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    failures = 0
    while True:
        with disk_jobs.full_after(failures) as has_failed, suppress(CheckpointError):
            save(folder, 2)
        if not has_failed():
            break
        failures += 1
        assert folder.steps() in ([1], [1, 2], [2])
        assert_all_whole(folder)
        if 2 in folder.steps():  # it was the links that found no room
            for step in folder.steps():
                disk_jobs.remove(folder.step_path(step))
            save(folder, 1)
    assert failures > 10
    assert folder.steps() == [2]
    assert_all_whole(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "step_00000002"]


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on files here")
@pytest.mark.parametrize("size", [0, 64, 1000, 2000])
def test_the_kernel_refuses(tmp_path: Path, size: int) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    with (
        longest_file(size),
        pytest.raises(CheckpointError, match=r"step_00000002 could not be written.*(File|disk)"),
    ):
        save(folder, 2)
    assert folder.steps() == [1]
    assert_all_whole(folder)
    assert not list(tmp_path.glob("*.tmp")), "what was written makes room again"


@pytest.mark.dist
def test_on_one_rank_of_two(tmp_path: Path) -> None:
    """All ranks raise, and the training that they share goes on to save again."""
    told = on_ranks(2, disk_jobs.save_with_one_full_disk, tmp_path)
    assert all("could not be written" in text and "No space left" in text for text in told)
    assert CheckpointFolder(tmp_path).steps() == [1, 3]


def test_the_same_step_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    save(folder, 1)
    assert_all_whole(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last", "step_00000001"]


def test_in_the_background_the_next_save_tells(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    model, optimizer = make()
    saver = BackgroundSaver()
    with patch("lbzoo.checkpoint.saving._add_state", side_effect=OSError(28, os.strerror(28))):
        saver.save(folder.step_path(1), model, content_of(model, optimizer, {"step": 1}), lambda: None)
        with pytest.raises(CheckpointError, match="No space left"):
            saver.wait()
    saver.save(folder.step_path(2), model, content_of(model, optimizer, {"step": 2}), lambda: None)
    saver.close()
    assert folder.steps() == [2]
    assert_all_whole(folder)


@pytest.mark.parametrize("optimizer", ["lamb", "vr_lamb", "adamw"])
def test_what_changes_afterwards_is_not_in_the_copy(tmp_path: Path, optimizer: str) -> None:
    """Weights, optimizer state and buffers of the moment of the save, however slowly it is written."""
    model, opt = disk_jobs.trained(optimizer)
    at_once, behind = tmp_path / "step_00000001", tmp_path / "step_00000002"
    save_checkpoint(at_once, model, opt, {"step": 1})
    saver = BackgroundSaver()
    for _ in range(2):  # the second time in the memory of the first
        saver.save(behind, model, content_of(model, opt, {"step": 1}), lambda: None)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)  # as the next forward pass does
        saver.wait_until_copied()
        disk_jobs.train(model, opt, steps=1)
        saver.wait()
        expected, actual = disk_jobs.trained(optimizer, seed=5), disk_jobs.trained(optimizer, seed=6)
        load_checkpoint(at_once, *expected)
        load_checkpoint(behind, *actual)
        assert disk_jobs.same(expected, actual)
        save_checkpoint(at_once, model, opt, {"step": 2})
    saver.close()
