"""Batch arithmetic by brute force, and the scaling rules against LAMB tables 4 and 5."""

from __future__ import annotations

import pytest

from lbzoo.errors import UsageError
from lbzoo.papers import find_rows
from lbzoo.scaling import accumulation, scaled_lr, scaled_warmup_epochs, steps_for_epochs
from lbzoo.schedules import build_schedule

IMAGENET_TRAIN = 1281167


def test_lamb_table_4_from_its_first_row() -> None:
    rows = find_rows("lamb/4")
    assert len(rows) == 7
    base = rows[0]
    for row in rows:
        sizes = {"base_global_batch_size": base["batch_size"], "global_batch_size": row["batch_size"]}
        assert scaled_lr(base["lr"], rule="sqrt", **sizes) == pytest.approx(row["lr"], rel=1e-11)
        ratio = scaled_warmup_epochs(base["warmup_ratio"], **sizes)
        assert ratio == pytest.approx(row["warmup_ratio"], rel=1e-12)
        steps = row["derived"]["steps"]
        schedule = build_schedule("polynomial", steps=steps, steps_per_epoch=1.0, warmup_ratio=ratio)
        assert schedule.warmup_steps == row["derived"]["warmup_steps"] == 3125


def test_lamb_table_5_from_its_first_row() -> None:
    rows = find_rows("lamb/5")
    assert len(rows) == 7
    base = rows[0]
    for row in rows:
        sizes = {"base_global_batch_size": base["batch_size"], "global_batch_size": row["batch_size"]}
        assert scaled_lr(base["lr"], rule="sqrt", **sizes) == pytest.approx(row["lr"], rel=1e-11)
        epochs = scaled_warmup_epochs(base["warmup_epochs"], **sizes)
        assert epochs == pytest.approx(row["warmup_epochs"], rel=1e-12)
        size = row["batch_size"]
        steps = steps_for_epochs(row["epochs"], IMAGENET_TRAIN, size)
        schedule = build_schedule(
            "polynomial", steps=steps, steps_per_epoch=IMAGENET_TRAIN / size, warmup_epochs=epochs
        )
        assert schedule.warmup_steps == 782  # 0.3125 epochs at batch 512, and the same steps at every other


def test_linear_rule() -> None:
    assert scaled_lr(0.1, rule="linear", base_global_batch_size=256, global_batch_size=8192) == pytest.approx(3.2)


def test_unknown_rule() -> None:
    with pytest.raises(UsageError, match="did you mean 'sqrt'"):
        scaled_lr(0.1, rule="sqr", base_global_batch_size=256, global_batch_size=512)


@pytest.mark.parametrize(
    ("epochs", "samples", "size", "steps"),
    [
        (90, IMAGENET_TRAIN, 16384, 7038),  # LAMB H.1
        (90, IMAGENET_TRAIN, 32768, 3519),  # papers/novograd.yaml, derived
        (1, 100, 10, 10),
        (1, 101, 10, 11),
        (1.1, 10, 11, 1),  # 1.1 * 10 / 11 is 1.0000000000000002 in binary floats
        (0.001, 10, 100, 1),
    ],
)
def test_steps_for_epochs(epochs: float, samples: int, size: int, steps: int) -> None:
    assert steps_for_epochs(epochs, samples, size) == steps


@pytest.mark.parametrize("epochs", [0, -1.0])
def test_no_steps(epochs: float) -> None:
    with pytest.raises(UsageError, match="no steps"):
        steps_for_epochs(epochs, 100, 10)


def test_accumulation() -> None:
    assert accumulation(global_batch_size=32768, micro_batch_size=128, world_size=8) == 32
    assert accumulation(global_batch_size=33792, micro_batch_size=22, world_size=1536) == 1  # LANS stage 2


def fits(global_batch_size: int, micro_batch_size: int, world_size: int) -> bool:
    return global_batch_size % (micro_batch_size * world_size) == 0


@pytest.mark.parametrize(("size", "micro", "world"), [(32768, 100, 8), (1000, 64, 4), (512, 64, 3), (7, 4, 2)])
def test_nearest_sizes_that_fit(size: int, micro: int, world: int) -> None:
    with pytest.raises(UsageError) as caught:
        accumulation(global_batch_size=size, micro_batch_size=micro, world_size=world)
    message = str(caught.value)
    assert f"global_batch_size {size}" in message
    assert f"micro_batch_size {micro}" in message

    below = [n for n in range(1, size) if fits(n, micro, world)]
    above = next(n for n in range(size + 1, 10 * size) if fits(n, micro, world))
    expected = [f"global_batch_size {below[-1]} or {above}" if below else f"global_batch_size {above}"]
    for name, choices, given in (
        ("micro_batch_size", [n for n in range(1, size + 1) if fits(size, n, world)], micro),
        ("number of devices", [n for n in range(1, size + 1) if fits(size, micro, n)], world),
    ):
        near = [n for n in choices if n < given][-1:] + [n for n in choices if n > given][:1]
        if near:
            expected.append(f"{name} " + " or ".join(map(str, near)))
    assert message.endswith("nearest that fit: " + "; or ".join(expected))


@pytest.mark.parametrize("name", ["global_batch_size", "micro_batch_size", "world_size"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
        accumulation(**{"global_batch_size": 8, "micro_batch_size": 2, "world_size": 1, name: 0})


def test_more_devices_than_micro_batches() -> None:
    with pytest.raises(UsageError, match=r"number of devices 4$"):
        accumulation(global_batch_size=256, micro_batch_size=64, world_size=5)
