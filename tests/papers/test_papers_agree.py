"""Numbers that one paper quotes from another."""

from __future__ import annotations

import pytest
from paper_facts import the_row

from lbzoo.papers import find_rows


def test_lamb_on_bert_in_vrgd() -> None:
    f1 = {str(row["batch_size"]): row["f1"] for row in find_rows("lamb/1", {"optimizer": "lamb"})}
    quoted = find_rows("vrgd/1", {"optimizer": "lamb"})
    assert len(quoted) == 3
    for row in quoted:
        assert row["f1"] == pytest.approx(f1[str(row["batch_size"])], abs=0.0051), row["batch_label"]


def test_lans_in_vrgd() -> None:
    assert the_row("vrgd/1", optimizer="lans")["f1"] == the_row("lans/2", optimizer="lans")["f1"]


def test_lamb_in_lans() -> None:
    quoted, mixed = the_row("lans/2", cited=True), the_row("lamb/1", batch_label="64k/32k")
    assert quoted["f1"] == pytest.approx(mixed["f1"], abs=0.0051)
    assert quoted["time_minutes"] == pytest.approx(mixed["time_minutes"], abs=0.051)
    assert quoted["steps"] == mixed["steps"]


def test_lamb_on_imagenet_in_vrgd() -> None:
    quoted = find_rows("vrgd/2", {"optimizer": "lamb"})
    assert quoted
    for row in quoted:
        original = the_row("lamb/5", batch_size=row["batch_size"])
        assert row["top1"] == pytest.approx(100 * original["top1"], abs=1e-9)


def test_goyal_in_novograd_and_vrgd() -> None:
    in_novograd = the_row("novograd/2", reference="Goyal et al. 2017", batch_size=8192)
    in_vrgd = the_row("vrgd/2", optimizer="momentum", batch_size=8192)
    assert in_novograd["top1"] == in_vrgd["top1"]
