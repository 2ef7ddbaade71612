"""Pairs for next-sentence prediction, and their masks, against what the definitions say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lbzoo.data.base import SampleKey
from lbzoo.data.masked_pairs import IGNORED, MaskedPairs, Masking, PairRow, PairsInMemory, most_predictions
from lbzoo.data.rng import stable_rng
from lbzoo.data.sentence_pairs import sentence_pairs
from lbzoo.data.wordpiece import SPECIAL_TOKENS, Vocabulary

SIZE, SEQ_LEN = 1000, 64
VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *(f"w{number}" for number in range(5, SIZE))))
PAD, UNK, CLS, SEP, MASK = range(5)


def documents(count: int = 40, sentences: int = 12, length: int = 9) -> list[list[list[int]]]:
    """Token ids that rise within a document, so that the place of each token can be read off it."""
    step = (SIZE - 5) // count
    assert sentences * length <= 1000
    return [
        [[5 + d * step + (s * length + t) % step for t in range(length)] for s in range(sentences)]
        for d in range(count)
    ]


def test_pairs_are_made_of_the_documents() -> None:
    docs = documents(8, 12, 10)  # 124 ids for each document of 120 tokens: a token says where it stands
    texts = [[token for sentence in doc for token in sentence] for doc in docs]
    pairs = list(sentence_pairs(docs, SEQ_LEN, VOCABULARY, stable_rng(1)))
    for tokens, second_start, is_random in pairs:
        assert len(tokens) <= SEQ_LEN
        assert tokens[0] == CLS
        assert tokens[second_start - 1] == tokens[-1] == SEP
        first, second = tokens[1 : second_start - 1], tokens[second_start:-1]
        assert first
        assert second
        home = next(n for n, text in enumerate(texts) if first[0] in text)
        assert all(b - a == 1 for part in (first, second) for a, b in pairwise(part))
        assert (second[0] in texts[home]) != is_random
        if not is_random:
            assert second[0] > first[-1]


def test_half_are_random_and_most_are_long() -> None:
    pairs = list(sentence_pairs(documents(60, 30), SEQ_LEN, VOCABULARY, stable_rng(0)))
    assert len(pairs) > 300
    share = np.mean([pair.is_random for pair in pairs])
    assert 0.4 < share < 0.6
    assert np.mean([len(pair.tokens) > SEQ_LEN - 10 for pair in pairs]) > 0.75


def test_no_sentence_of_the_corpus_is_left_out() -> None:
    docs = documents(8, 12, 10)
    long = list(sentence_pairs(docs, 512, VOCABULARY, stable_rng(0)))
    seen = {token for pair in long for token in pair.tokens}
    assert {token for doc in docs for sentence in doc for token in sentence} <= seen


def test_one_document_and_one_sentence() -> None:
    (pair,) = sentence_pairs([[[7, 8, 9]]], 16, VOCABULARY, stable_rng(0))
    assert pair.tokens == [CLS, 7, 8, 9, SEP, 7, 8, 9, SEP]
    assert pair.is_random


def test_a_very_long_sentence_is_cut_evenly() -> None:
    docs = [[list(range(5, 905))], [list(range(905, 1000))]]
    for pair in sentence_pairs(docs, SEQ_LEN, VOCABULARY, stable_rng(3)):
        assert len(pair.tokens) <= SEQ_LEN
        assert abs((pair.second_start - 2) - (len(pair.tokens) - pair.second_start - 1)) <= 1


@pytest.mark.parametrize(("seq_len", "most"), [(128, 20), (512, 77)])
def test_how_many_predictions(seq_len: int, most: int) -> None:
    assert most_predictions(seq_len, 0.15) == most


def masked(pairs: int = 400, seed: int = 3) -> MaskedPairs:
    rows = []
    for number in range(pairs):
        length = SEQ_LEN if number % 4 else 30
        tokens = np.array([CLS, *stable_rng(number).randint(5, SIZE, length - 3), SEP, SEP], np.uint16)
        tokens[length // 2] = SEP
        rows.append(PairRow(tokens, length // 2 + 1, bool(number % 2)))
    return MaskedPairs.of(
        PairsInMemory(rows), VOCABULARY, seq_len=SEQ_LEN, fraction=0.15, max_predictions=None, seed=seed
    )


def test_a_batch_holds_what_was_stored() -> None:
    samples = masked()
    batch = {name: tensor.numpy() for name, tensor in samples.__getitems__([SampleKey(4, 0), SampleKey(5, 0)]).items()}
    for row, number in enumerate((4, 5)):
        (stored,) = samples.rows.read([number])
        length = len(stored.tokens)
        assert batch["attention_mask"][row].sum() == length
        assert (batch["input_ids"][row, length:] == PAD).all()
        assert batch["token_type_ids"][row].tolist() == [
            int(stored.second_start <= place < length) for place in range(SEQ_LEN)
        ]
        restored, labels = batch["input_ids"][row].copy(), batch["masked_labels"][row]
        count = max(round(0.15 * length), 1)
        assert (labels != IGNORED).sum() == count
        places = batch["masked_positions"][row, :count]
        assert len(set(places.tolist())) == count
        assert (np.diff(places) > 0).all()
        restored[places] = labels[:count]
        assert restored[:length].tolist() == stored.tokens.tolist()
        assert not {CLS, SEP, PAD} & set(labels[:count].tolist())
        assert batch["next_sentence_label"][row] == number % 2


def test_masks_are_a_function_of_seed_sample_and_epoch() -> None:
    samples = masked()
    together = samples.__getitems__([SampleKey(n, 2) for n in range(20)])
    for number in (0, 7, 19):
        alone = samples[SampleKey(number, 2)]
        assert all((alone[name][0] == together[name][number]).all() for name in alone)
    other_epoch, other_seed = samples[SampleKey(7, 3)], masked(seed=4)[SampleKey(7, 2)]
    for other in (other_epoch, other_seed):
        assert (other["masked_positions"][0] != together["masked_positions"][7]).any()


def test_the_shares_of_masking() -> None:
    samples = masked()
    rows = samples.rows.read(range(400))
    batch = samples.__getitems__([SampleKey(n, epoch) for epoch in range(5) for n in range(400)])
    tokens, labels = batch["input_ids"].numpy(), batch["masked_labels"].numpy()
    now = np.take_along_axis(tokens, batch["masked_positions"].numpy(), axis=1)[labels != IGNORED]
    before = labels[labels != IGNORED]
    assert np.mean(now == MASK) == pytest.approx(0.8, abs=0.015)
    assert np.mean(now == before) == pytest.approx(0.1, abs=0.015)
    replaced = now[(now != MASK) & (now != before)]
    assert replaced.min() < 20
    assert replaced.max() > SIZE - 20
    hits = np.zeros(SEQ_LEN)
    np.add.at(hits, batch["masked_positions"].numpy()[labels != IGNORED], 1)
    ordinary = [place for place in range(1, 28) if place != 15]
    assert hits[ordinary].std() / hits[ordinary].mean() < 0.2, "every place is as likely"
    assert len(rows) == 400


def test_at_most_so_many_predictions() -> None:
    masking = Masking.of(VOCABULARY, SEQ_LEN, 0.15, 3)
    tokens = np.full((1, SEQ_LEN), 9, np.int64)
    places, labels = masking.apply(tokens, np.array([SEQ_LEN]), [SampleKey(0, 0)], seed=0)
    assert places.shape == labels.shape == (1, 3)
    assert (labels == 9).all()
