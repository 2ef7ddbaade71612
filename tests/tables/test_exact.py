"""What the papers say without training, by the zoo's own code."""

from __future__ import annotations

import pytest

from lbzoo.papers import PAPERS, load_paper
from lbzoo.tables.exact import ExactCheck, exact_checks, exact_ids


@pytest.mark.parametrize("each_id", exact_ids())
def test_the_paper_s_numbers_come_out(each_id: str) -> None:
    checks = exact_checks(each_id)
    assert checks
    assert [check for check in checks if not check.agrees] == []


def test_what_is_checkable_without_training_is_checked() -> None:
    checkable = {
        figure["id"]
        for paper in PAPERS
        for figure in load_paper(paper)["figures"]
        if figure.get("checkable_without_training")
    }
    assert checkable
    assert checkable <= set(exact_ids())


def test_warmup_steps_of_every_bert_row_of_lamb() -> None:
    for table_id in ("lamb/1", "lamb/2", "lamb/4"):
        warmup = [
            check
            for check in exact_checks(table_id)
            if check.what.endswith(": warmup steps") and "K/" not in check.what
        ]
        assert [check.ours for check in warmup] == [3125] * 7
    assert [check.ours for check in exact_checks("lamb/8")] == [1563] * 3 + [3125] * 3 + [6250] * 3


def test_lans_figure_1() -> None:
    assert [(check.paper, round(check.ours, 2)) for check in exact_checks("lans/fig1")] == [(5.28, 5.28), (1.91, 1.91)]


def test_a_wrong_number_does_not_agree() -> None:
    assert not ExactCheck("lans/fig1", "area", 5.28, 5.29, 0.005).agrees


def test_most_tables_have_none() -> None:
    assert exact_checks("vrgd/4") == []
