"""The papers' tables as objects: keys that tell rows apart, selectors, and their mistakes."""

from __future__ import annotations

import pytest

from lbzoo.errors import UsageError
from lbzoo.papers import find_rows, find_table
from lbzoo.tables.paper_tables import cell_text, one_row, paper_table, select_rows, table_ids


def test_all_tables_and_rows() -> None:
    assert len(table_ids()) == 39
    assert sum(len(paper_table(each).rows) for each in table_ids()) == 550


@pytest.mark.parametrize("table_id", table_ids())
def test_a_key_picks_its_row_from_the_data(table_id: str) -> None:
    table = paper_table(table_id)
    assert len({row.label for row in table.rows}) == len({row.slug for row in table.rows}) == len(table.rows)
    for row, printed in zip(table.rows, find_table(table_id)["rows"], strict=True):
        found = [each for each in find_rows(table_id, row.key) if set(row.key) == _key_of(each, row.key)]
        assert printed.items() <= found[0].items()
        assert {each.metric.name: each.value for each in row.reported}.items() <= printed.items()
        assert not {each.metric.name for each in row.reported} & set(row.settings), "results are no settings"


def _key_of(row: dict, key: object) -> set[str]:
    return {column for column in key if column in row}  # type: ignore[attr-defined]


def test_the_best_of_tuning_tables_brings_its_settings() -> None:
    adagrad, plus = paper_table("lamb/3").rows[:2]
    assert (adagrad.settings["lr"], "warmup_epochs" in adagrad.settings) == (0.4, False)
    best = max(find_rows("lamb/10"), key=lambda row: row["top1"])
    assert plus.settings["lr"] == best["lr"]
    assert (plus.settings["warmup_epochs"], plus.settings["decay_epochs"]) == (5.0, [30, 60, 80])
    adamw = paper_table("lamb/3").rows[4].settings
    assert (adamw["weight_decay"], adamw["l2_regularization"]) == (1e-5, 0.0)


@pytest.mark.parametrize(
    ("selectors", "numbers"),
    [
        ([], [1, 2, 3, 4, 5, 6, 7]),
        (["3"], [3]),
        (["1-2,7"], [1, 2, 7]),
        (["batch_size=1024"], [2]),
        (["batch_size=1024", "7"], [2, 7]),
        (["lr=5e-3"], [1]),
    ],
)
def test_selectors(selectors: list[str], numbers: list[int]) -> None:
    assert [row.number for row in select_rows(paper_table("lamb/5"), selectors)] == numbers


def test_selectors_of_text_lists_and_phases() -> None:
    assert one_row(paper_table("lamb/3"), "optimizer=adam,lr_scheme=goyal").number == 4
    assert one_row(paper_table("novograd/2"), "tricks=none,batch_size=8192").number == 7
    assert one_row(paper_table("lamb/1"), "batch_size=65536/32768").number == 9


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("8", r"table lamb/5 has rows 1 to 7, not 8"),
        ("batch=512", r"no column of lamb/5 named 'batch'; did you mean 'batch_size'\?"),
        ("batch_size=500", r"no row of table lamb/5 holds batch_size=500; its rows:\n +1 +batch_size=512"),
        ("512", r"rows 1 to 7"),
        ("biggest", r"name rows by number .* or by column"),
    ],
)
def test_mistakes_in_selectors(selector: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select_rows(paper_table("lamb/5"), [selector])


def test_one_row_needs_one() -> None:
    with pytest.raises(UsageError, match=r"7 rows; say which with --row:\n +1 +batch_size=512"):
        one_row(paper_table("lamb/5"), None)
    with pytest.raises(UsageError, match="7 rows of lamb/5 hold epochs=90; say which"):
        one_row(paper_table("lamb/5"), "epochs=90")


def test_unknown_table() -> None:
    with pytest.raises(UsageError, match=r"no table named 'lamb/33'; did you mean 'lamb/3'\?"):
        paper_table("lamb/33")


def test_cells_as_text() -> None:
    assert cell_text({"phase1": 65536, "phase2": 32768}) == "65536/32768"
    assert (cell_text([]), cell_text(["warmup", "lars"]), cell_text(0.1 + 0.2)) == ("none", "warmup+lars", "0.3")
