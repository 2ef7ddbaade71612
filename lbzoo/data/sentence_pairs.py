"""Pairs of sentences for next-sentence prediction, as BERT's (arXiv 1810.04805, section 3.1 and appendix A.2).

A document is a list of sentences, a sentence a list of token ids. A pair is two stretches of sentences: in half of the
pairs the second follows the first, in the other half it comes from another document; and always where the first is a
single sentence that leaves no room for the one after it, as in BERT's own program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lbzoo.data.wordpiece import CLASSIFY, SEPARATE, Vocabulary

if TYPE_CHECKING:
    from numpy.random import RandomState

Sentence = Sequence[int]
Document = Sequence[Sentence]

SHORT_PAIRS = 0.1  # of all pairs are shorter than they might be: fine-tuning has short inputs too
_TRIES = 10  # to find another document


class SentencePair(NamedTuple):
    """``tokens``: [CLS] first [SEP] second [SEP]; ``second_start``: where the second begins, after its [SEP]."""

    tokens: list[int]
    second_start: int
    is_random: bool


def sentence_pairs(
    documents: Sequence[Document], seq_len: int, vocabulary: Vocabulary, rng: RandomState
) -> Iterator[SentencePair]:
    """One pass over the documents, in pairs of at most ``seq_len`` tokens, nearly all of them that long."""
    for number in range(len(documents)):
        for first, second, is_random in _stretches(documents, number, seq_len - 3, rng):
            _truncate(first, second, seq_len - 3, rng)
            cls, sep = vocabulary[CLASSIFY], vocabulary[SEPARATE]
            yield SentencePair([cls, *first, sep, *second, sep], len(first) + 2, is_random)


def _stretches(
    documents: Sequence[Document], number: int, room: int, rng: RandomState
) -> Iterator[tuple[list[int], list[int], bool]]:
    """(first, second, whether the second is another document's), each pair of about ``room`` tokens in all."""
    document = documents[number]
    chunk: list[Sentence] = []
    length, place = 0, 0
    wanted = _wanted_length(room, rng)
    while place < len(document):
        chunk.append(document[place])
        length += len(document[place])
        place += 1
        if place < len(document) and length < wanted:
            continue
        split = int(rng.randint(1, len(chunk))) if len(chunk) > 1 else 1
        first = _joined(chunk[:split])
        is_random = len(chunk) == 1 or rng.random_sample() < 0.5
        if is_random:
            second = _elsewhere(documents, number, max(wanted - len(first), 1), rng)
            place -= len(chunk) - split  # what the second might have been is used for the next pair
        else:
            second = _joined(chunk[split:])
        yield first, second, is_random
        chunk, length, wanted = [], 0, _wanted_length(room, rng)


def _wanted_length(room: int, rng: RandomState) -> int:
    return int(rng.randint(2, room + 1)) if rng.random_sample() < SHORT_PAIRS else room


def _elsewhere(documents: Sequence[Document], number: int, length: int, rng: RandomState) -> list[int]:
    """Sentences from a random place of another document; of the same one where there is no other."""
    for _ in range(_TRIES):
        other = int(rng.randint(len(documents)))
        if other != number:
            break
    sentences = documents[other]
    tokens: list[int] = []
    for sentence in sentences[int(rng.randint(len(sentences))) :]:
        tokens += sentence
        if len(tokens) >= length:
            break
    return tokens


def _joined(sentences: Sequence[Sentence]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def _truncate(first: list[int], second: list[int], room: int, rng: RandomState) -> None:
    """Take tokens off the longer one, at its front or its back at random, until both fit."""
    excess = len(first) + len(second) - room
    if excess <= 0:
        return
    longer, shorter = (first, second) if len(first) > len(second) else (second, first)
    off_longer = min(excess, len(longer) - len(shorter))
    rest = excess - off_longer
    for tokens, count in ((longer, off_longer + (rest + 1) // 2), (shorter, rest // 2)):
        front = int(rng.binomial(count, 0.5)) if count else 0
        tokens[:] = tokens[front : len(tokens) - (count - front)]
