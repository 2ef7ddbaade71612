"""The VRGD paper's arithmetic: steps of BERT runs, printed differences and gaps."""

from __future__ import annotations

import pytest
from paper_facts import bert_steps, figure, the_row

from lbzoo.papers import find_rows


def test_table_1_steps() -> None:
    steps: dict[str, int] = {}
    for row in find_rows("vrgd/1"):
        label = row["batch_label"]
        assert steps.setdefault(label, row["steps"]) == row["steps"], label
        if label == "128k/32k":
            assert row["steps"] > 1.2 * bert_steps(row["batch_size"]), "Adasum takes more steps"
        else:
            assert row["steps"] / bert_steps(row["batch_size"]) == pytest.approx(1.0, abs=1.5e-3), label
    assert steps["64k"] == 7038 + 782
    assert steps["128k/64k"] == 3519 + 782
    assert pytest.approx(0.299, abs=5e-4) == 1 - 4301 / 6137, "steps saved against Adasum"


@pytest.mark.parametrize(
    ("table_id", "metric", "points", "against_own_base", "printed"),
    [
        ("vrgd/1", "f1", 1, False, 5),
        ("vrgd/2", "top1", 1, False, 7),
        ("vrgd/4", "auc", 100, True, 5),
        ("vrgd/5", "top1", 1, True, 24),
    ],
)
def test_printed_differences(table_id: str, metric: str, points: int, against_own_base: bool, printed: int) -> None:
    """Against the base optimizer at the same batch size, or against the best cited result there."""
    rows = [row for row in find_rows(table_id) if "delta_reported_pp" in row]
    assert len(rows) == printed
    for row in rows:
        batch = row["batch_size"]
        if against_own_base:
            base = the_row(table_id, optimizer=row["optimizer"].removeprefix("vr-"), batch_size=batch)[metric]
        else:
            base = max(each[metric] for each in find_rows(table_id, {"batch_size": batch, "cited": True}))
        difference = (row[metric] - base) * points
        assert difference == pytest.approx(row["delta_reported_pp"], abs=0.0051), (row["optimizer"], batch)


def test_table_3_gaps() -> None:
    for row in find_rows("vrgd/3"):
        misprinted = row["optimizer"] == "vr-lars" and row["batch_size"] == 32768
        gap = 3.19 if misprinted else row["gap"]
        assert row["train_acc"] - row["test_acc"] == pytest.approx(gap, abs=0.0051)
        same = the_row("vrgd/2", optimizer=row["optimizer"], batch_size=row["batch_size"])
        assert same["top1"] == pytest.approx(row["test_acc"], abs=1e-9)
        if "gap_reduction_reported_pct" in row:
            lars = the_row("vrgd/3", optimizer="lars", batch_size=row["batch_size"])["gap"]
            assert 100 * (1 - row["gap"] / lars) == pytest.approx(row["gap_reduction_reported_pct"], abs=0.051)


def test_figures() -> None:
    reported = figure("vrgd/fig3")["reported"]
    samples = [reported["batch_size"] // devices for devices in reversed(reported["k_opt"])]
    assert samples == reported["samples_per_device"]
    assert figure("vrgd/linreg")["inputs"]["true_weights"] == list(range(1, 11))
