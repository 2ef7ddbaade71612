"""The LAMB paper's arithmetic: steps, square-root scaling, tuning grids, speed-ups."""

from __future__ import annotations

import math
import re

import pytest
from paper_facts import BERT_SEQUENCES, EVALUATION_IMAGES, IMAGENET_TRAIN, figure, the_row, value_of

from lbzoo.papers import find_rows, find_table

LAMB_F1 = {row["batch_size"]: row["f1"] for row in find_rows("lamb/1", {"optimizer": "lamb"})[:-1]}


def ids(numbers: list[int]) -> list[str]:
    return [f"lamb/{number}" for number in numbers]


def test_table_1_sequences_and_times() -> None:
    for row in find_rows("lamb/1"):
        batch = row["batch_size"]
        if isinstance(batch, dict):
            sequences = batch["phase1"] * 7037 + batch["phase2"] * 1562
            assert sequences / BERT_SEQUENCES == pytest.approx(1.0, abs=1e-3)
            assert row["steps"] == 7037 + 1562 == 8599
        else:
            assert batch * row["steps"] == BERT_SEQUENCES
            assert batch // row["tpus"] == 32
        amount, unit = re.fullmatch(r"([\d.]+)([hm])", row["time"]).groups()  # type: ignore[union-attr]
        assert row["time_minutes"] == pytest.approx(float(amount) * (60 if unit == "h" else 1), abs=1e-6)


def test_phases_at_32k() -> None:
    assert 14063 + 1562 == the_row("lamb/1", batch_size=32768)["steps"] == 15625


@pytest.mark.parametrize("table_id", ["lamb/2", "lamb/4"])
def test_f1_is_the_same_in_every_table(table_id: str) -> None:
    for row in find_rows(table_id, {"optimizer": "lamb"}):
        assert row["f1"] == LAMB_F1[row["batch_size"]]


@pytest.mark.parametrize("row", find_rows("lamb/4"), ids=lambda row: str(row["batch_size"]))
def test_table_4_scaling(row: dict) -> None:
    batch = row["batch_size"]
    assert value_of(row["lr_expr"]) / row["lr"] == pytest.approx(1.0, abs=1e-9)
    assert row["lr"] / 0.005 == pytest.approx(math.sqrt(batch / 32768), abs=1e-9)
    assert value_of(row["warmup_ratio_expr"]) == pytest.approx(row["warmup_ratio"], abs=1e-12)
    steps = BERT_SEQUENCES // batch
    assert row["derived"]["steps"] == steps
    assert row["warmup_ratio"] * steps == pytest.approx(3125, abs=1e-6)


def test_warmup_steps_as_stated() -> None:
    assert pytest.approx(3125, abs=1e-9) == 0.2 * 15625


@pytest.mark.parametrize("row", find_rows("lamb/5"), ids=lambda row: str(row["batch_size"]))
def test_table_5_scaling(row: dict) -> None:
    batch = row["batch_size"]
    assert value_of(row["lr_expr"]) / row["lr"] == pytest.approx(1.0, abs=1e-9)
    assert row["lr"] / 0.04 == pytest.approx(math.sqrt(batch / 32768), abs=1e-9)
    assert row["warmup_epochs"] / batch == pytest.approx(20 / 32768, abs=1e-12)


def test_table_3_is_the_best_of_the_tuning_tables() -> None:
    assert the_row("lamb/3", label="lamb")["top1"] == the_row("lamb/5", batch_size=16384)["top1"]
    tuned = [row for row in find_rows("lamb/3") if "best_of" in row]
    assert len(tuned) == 6
    for row in tuned:
        best = max(each["top1"] for table_id in row["best_of"] for each in find_rows(table_id))
        assert row["top1"] == pytest.approx(best, abs=5.1e-5), row["label"]


def test_imagenet_steps() -> None:
    assert math.ceil(IMAGENET_TRAIN / 16384 * 90) == 7038


@pytest.mark.parametrize("table_id", ids([9, 10, *range(12, 26)]))
def test_accuracies_are_whole_numbers_of_images(table_id: str) -> None:
    for row in find_rows(table_id):
        images = row["top1"] * EVALUATION_IMAGES
        assert images == pytest.approx(round(images), abs=0.01), row["lr"]


GRID = [row["lr"] for row in find_rows("lamb/13")]


@pytest.mark.parametrize("table_id", ids([*range(13, 21), 24, 25]))
def test_tuning_grid_of_one_weight_decay(table_id: str) -> None:
    rows = find_rows(table_id)
    assert [row["lr"] for row in rows] == GRID
    assert len({row["weight_decay"] for row in rows}) == 1


@pytest.mark.parametrize("table_id", ids([21, 22, 23]))
def test_tuning_grid_of_two_weight_decays(table_id: str) -> None:
    rows = find_rows(table_id)
    assert [row["lr"] for row in rows] == GRID[:10] * 2
    assert len({row["weight_decay"] for row in rows}) == 2


@pytest.mark.parametrize("first", [13, 17])
def test_weight_decays_of_the_tuning_tables(first: int) -> None:
    decays = [find_rows(table_id)[0]["weight_decay"] for table_id in ids([*range(first, first + 4)])]
    assert decays == [1e-5, 1e-4, 1e-3, 1e-2]


@pytest.mark.parametrize(
    ("numbers", "l2"), [(range(13, 17), 0.01), (range(17, 21), 0.0), (range(21, 23), 0.01), (range(23, 26), 0.0)]
)
def test_l2_of_the_tuning_tables(numbers: range, l2: float) -> None:
    assert {row["l2_regularization"] for table_id in ids([*numbers]) for row in find_rows(table_id)} == {l2}


def test_table_8() -> None:
    rows = find_rows("lamb/8")
    for row in rows:
        assert row["warmup_ratio"] * 31250 == pytest.approx(row["warmup_steps"], abs=1e-6)
    assert max(row["f1"] for row in rows if row["f1"] is not None) == 88.540


def test_figure_8_speedups() -> None:
    data = figure("lamb/fig8")
    inputs, computed, reported = data["inputs"], data["computed"], data["reported"]
    runs = {
        "32k": (inputs["minutes_lamb_512"], inputs["minutes_32k"]),
        "mixed": (inputs["minutes_lamb_512"], inputs["minutes_mixed"]),
        "mixed_vs_baseline": (inputs["minutes_baseline_512"], inputs["minutes_mixed"]),
    }
    for name, (before, after) in runs.items():
        speedup = before / after
        assert speedup == pytest.approx(computed[f"speedup_{name}"], abs=0.01)
        assert 100 * speedup / inputs["tpus_ratio"] == pytest.approx(computed[f"efficiency_{name}_pct"], abs=0.01)
    for name, tolerance in (("speedup_32k", 0.05), ("speedup_mixed", 0.05)):
        assert computed[name] == pytest.approx(reported[name], abs=tolerance)
    for name in ("efficiency_32k_pct", "efficiency_mixed_pct"):
        assert computed[name] == pytest.approx(reported[name], abs=0.11)


def test_figure_2_bias_correction() -> None:
    for name, value in figure("lamb/fig2")["computed"].items():
        t = int(name.removeprefix("t_"))
        assert math.sqrt(1 - 0.999**t) / (1 - 0.9**t) == pytest.approx(value, abs=5.1e-5)


def test_tuning_tables_share_their_captions_l2() -> None:
    """The captions name the weight decay of the rows below them."""
    for number in range(13, 21):
        table = find_table(f"lamb/{number}")
        decay = table["rows"][0]["weight_decay"]
        assert f"{decay:.5f}".rstrip("0") in table["caption"]
