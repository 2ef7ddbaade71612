"""The NovoGrad paper's arithmetic, and the places where its tables have to agree."""

from __future__ import annotations

import math

import pytest
from paper_facts import IMAGENET_TRAIN, the_row

from lbzoo.papers import find_rows


def test_learning_rates_of_table_3() -> None:
    at_100_epochs = the_row("novograd/1", optimizer="novograd", epochs=100)
    rows = {row["batch_size"]: row for row in find_rows("novograd/3")}
    smallest = rows[1024]
    assert smallest["lr_recommended"] == at_100_epochs["lr"] == 0.007
    assert smallest["lr_recommended"] < rows[8192]["lr"] < rows[32768]["lr"] < smallest["lr"], "0.070 is a misprint"
    assert smallest["weight_decay"] == at_100_epochs["weight_decay"]


@pytest.mark.parametrize("batch", [8192, 32768])
def test_table_2_repeats_table_3(batch: int) -> None:
    second = the_row("novograd/2", optimizer="novograd", batch_size=batch, tricks=[])
    third = the_row("novograd/3", batch_size=batch)
    assert [second[key] for key in ("top1", "lr", "weight_decay")] == [
        third[key] for key in ("top1", "lr", "weight_decay")
    ]


def test_warmup_run() -> None:
    row = the_row("novograd/2", optimizer="novograd", tricks=["warmup"])
    assert (row["warmup_steps"], row["top1"]) == (500, 75.99)


def test_table_5() -> None:
    rows = {row["batch_size"]: row for row in find_rows("novograd/5")}
    assert rows[8192]["lr"] == 2 * rows[4096]["lr"] == 4 * rows[512]["lr"]
    assert max(rows, key=lambda batch: rows[batch]["wer_dev_clean"]) == 32768


@pytest.mark.parametrize("table_id", ["novograd/4", "novograd/5"])
def test_order_of_the_word_error_columns(table_id: str) -> None:
    for row in find_rows(table_id):
        assert row["wer_dev_clean"] <= row["wer_test_clean"] < row["wer_dev_other"]


def test_transformer_xl_tokens() -> None:
    assert pytest.approx(91553, abs=1) == 12e9 / (256 * 512)
    assert pytest.approx(1.0, abs=1e-3) == 12e9 / 366e3 / (64 * 512), "tokens an iteration in the text"
    assert pytest.approx(1.0, abs=0.01) == 12e9 / 117 / 103e6, "epochs"


def test_steps() -> None:
    assert math.ceil(IMAGENET_TRAIN / 32768 * 90) == 3519
    assert pytest.approx(9, abs=0.5) == 281241 / 32768, "updates an epoch of LibriSpeech"


def test_transformer_big_is_six_and_six_layers() -> None:
    width, inner, vocabulary = 1024, 4096, 8192
    encoder = 4 * width**2 + 2 * width * inner
    decoder = 8 * width**2 + 2 * width * inner
    assert vocabulary * width + 6 * (encoder + decoder) == pytest.approx(185e6, abs=1e6)


def test_order_of_columns() -> None:
    assert all(row["token_bleu"] > row["sacrebleu"] for row in find_rows("novograd/6"))
    assert all(row["test_ppl"] > row["val_ppl"] for row in find_rows("novograd/7"))
