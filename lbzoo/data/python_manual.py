"""The manual of Python, which comes with it: English text for runs of seconds."""

from __future__ import annotations

from functools import cached_property, lru_cache

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import as_batch
from lbzoo.data.masked_pairs import MaskedPairs, PairRow, PairsInMemory, check_masking
from lbzoo.data.rng import stable_rng
from lbzoo.data.sentence_pairs import Document, sentence_pairs
from lbzoo.data.wordpiece import HasVocabulary, Vocabulary, train_vocabulary
from lbzoo.errors import UsageError
from lbzoo.registry import register_data

NUM_TRAIN, NUM_VAL = 8192, 256
VOCABULARY = 1200  # tokens
_VALIDATION = 10  # one topic of so many is for validation
_SEED = 0  # pairs are the same for every run, whatever its seed, so that runs can be compared


@register_data("python_manual")
class PythonManual(HasVocabulary, DataSource):
    """Python's own manual (``pydoc_data``, embedded): sentence pairs with masked tokens, 465 KB of English.

    WordPiece with a vocabulary of ``vocab_size`` tokens, made from the text. Every tenth topic is for validation.
    """

    in_memory = True
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        seq_len: int = 64,
        vocab_size: int = VOCABULARY,
        masked_fraction: float = 0.15,
        max_predictions: int | None = None,
    ) -> None:
        check_masking("python_manual", seq_len, masked_fraction, max_predictions)
        if vocab_size < 500:
            raise UsageError(f"data python_manual: vocab_size must be at least 500, got {vocab_size}")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.masked_fraction, self.max_predictions = masked_fraction, max_predictions

    def facts(self) -> DataFacts:
        return DataFacts(NUM_TRAIN, NUM_VAL, unit="sequences", vocab_size=self.vocab_size)

    def prepare(self) -> None:
        """Nothing can be missing: the manual is part of Python."""

    def train_dataset(self, *, seed: int = 0) -> MaskedPairs:
        return self._masked(self._pairs[0], seed)

    def val_dataset(self) -> MaskedPairs:
        return self._masked(self._pairs[1], _SEED)

    @property
    def vocabulary(self) -> Vocabulary:
        return manual_vocabulary(self.vocab_size)

    @cached_property
    def _pairs(self) -> tuple[PairsInMemory, PairsInMemory]:
        train, validation = manual_documents(self.vocab_size)
        return self._drawn(train, NUM_TRAIN), self._drawn(validation, NUM_VAL)

    def _drawn(self, documents: list[Document], count: int) -> PairsInMemory:
        """As many pairs as are wanted, from as many passes over the documents as that takes."""
        import numpy as np

        rows: list[PairRow] = []
        passes = 0
        while len(rows) < count:
            rng = stable_rng(_SEED, self.seq_len, passes)
            for pair in sentence_pairs(documents, self.seq_len, self.vocabulary, rng):
                rows.append(PairRow(np.asarray(pair.tokens), pair.second_start, pair.is_random))
            passes += 1
        return PairsInMemory(rows[:count])

    def _masked(self, rows: PairsInMemory, seed: int) -> MaskedPairs:
        return MaskedPairs.of(
            rows,
            self.vocabulary,
            seq_len=self.seq_len,
            fraction=self.masked_fraction,
            max_predictions=self.max_predictions,
            seed=seed,
        )


@lru_cache(maxsize=4)
def manual_vocabulary(size: int) -> Vocabulary:
    """WordPiece made from the whole manual; other embedded texts use it as well."""
    return train_vocabulary([paragraph for topic in _topics() for paragraph in topic], size)


@lru_cache(maxsize=4)
def manual_documents(vocab_size: int) -> tuple[list[Document], list[Document]]:
    """(training, validation): every topic a document whose sentences are its paragraphs, tokenised."""
    vocabulary = manual_vocabulary(vocab_size)
    documents: list[Document] = [[enc.ids for enc in vocabulary.encode(topic) if enc.ids] for topic in _topics()]
    train = [document for number, document in enumerate(documents) if number % _VALIDATION != 1]
    return train, documents[1::_VALIDATION]


def _topics() -> list[list[str]]:
    """The manual's topics in order, each a list of paragraphs."""
    from pydoc_data.topics import topics

    texts = (topics[name] for name in sorted(topics))
    return [[" ".join(p.split()) for p in text.split("\n\n") if p.strip()] for text in texts]
