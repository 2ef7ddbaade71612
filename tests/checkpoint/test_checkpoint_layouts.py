"""What one layout saved any other loads, to the last bit: weights, buffers, and the optimizer's state and groups."""

from __future__ import annotations

from pathlib import Path

import layout_jobs
import pytest
import torch
from distributed import on_ranks

LAYOUTS = [(1, "whole"), (2, "whole"), (1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp")]
OPTIMIZERS = ["vr_lamb", "novograd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "larc_lans"))]


def differing(saved: layout_jobs.State, loaded: layout_jobs.State) -> list[str]:
    assert saved.keys() == loaded.keys()
    return [name for name, value in saved.items() if not _same(value, loaded[name])]


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_saved_by_one_and_loaded_by_all(tmp_path: Path, ranks: int, layout: str, optimizer: str) -> None:
    path = tmp_path / "step_00000003"
    saved = on_ranks(ranks, layout_jobs.save, layout, optimizer, path)
    assert not differing(saved[0], saved[-1])
    assert not any("module." in name or "_orig_mod" in name or "wrapped" in name for name in saved[0])
    assert any(name.startswith("state.head.bias.") and torch.any(value != 0) for name, value in saved[0].items())
    for other_ranks, other in LAYOUTS:
        for loaded in on_ranks(other_ranks, layout_jobs.load, other, optimizer, path):
            assert not differing(saved[0], loaded), f"by {other_ranks} x {other}"
