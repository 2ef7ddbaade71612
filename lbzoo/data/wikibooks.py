"""Wikipedia and books, or any other text, as ``lbzoo prepare bert`` leaves it: sentence pairs in shards of tokens."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import as_batch
from lbzoo.data.locations import data_folder, unusable
from lbzoo.data.masked_pairs import MaskedPairs, check_masking
from lbzoo.data.token_shards import (
    VOCABULARY_FILE,
    Manifest,
    TokenShards,
    read_manifest,
    shard_problems,
)
from lbzoo.data.wordpiece import BERT_VOCABULARY, HasVocabulary, Vocabulary, read_vocabulary
from lbzoo.errors import DataError
from lbzoo.registry import register_data

ROOT_VARIABLE = "LBZOO_WIKIBOOKS"
NUM_WORDS = 3_300_000_000  # Wikipedia 2.5 billion, BookCorpus 0.8 (LAMB, section 4.1)
NUM_VAL = 10_000
_SHOWN = 10  # damaged files in one error
_VALIDATION_SEED = 0  # the masks of the validation set are the same for every run


@register_data("wikibooks")
class WikiBooks(HasVocabulary, DataSource):
    """Sentence pairs with masked tokens from shards that ``lbzoo prepare bert`` makes of Wikipedia and books, any text.

    ``root`` or $LBZOO_WIKIBOOKS is their folder. Nominal size: the papers' 3.3 billion words in sequences of
    ``seq_len``, a word a token, as BERT's authors count epochs (40 of them in 10^6 steps of 128,000 tokens).

    ``masked_fraction`` of the tokens are to be predicted, at most ``max_predictions`` of a sequence (default: the
    fraction of a full one, 20 of 128 and 77 of 512). ``cache_mib`` is what each loader process keeps of the shards.
    """

    preshuffled = True  # documents are dealt to shards at random, pairs shuffled within them
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        root: str | None = None,
        seq_len: int = 128,
        vocab_size: int = BERT_VOCABULARY,
        masked_fraction: float = 0.15,
        max_predictions: int | None = None,
        cache_mib: int = 64,
    ) -> None:
        check_masking("wikibooks", seq_len, masked_fraction, max_predictions)
        self.root, self.seq_len, self.vocab_size = root, seq_len, vocab_size
        self.masked_fraction, self.max_predictions = masked_fraction, max_predictions
        self.cache_bytes = cache_mib << 20
        self._counts = NUM_WORDS // seq_len, NUM_VAL

    def facts(self) -> DataFacts:
        return DataFacts(*self._counts, unit="sequences", vocab_size=self.vocab_size)

    def prepare(self) -> None:
        manifest, folder = self._manifest, self.folder
        if str(self.seq_len) not in manifest.shards:
            raise DataError(
                f"{folder} holds sequences of {' and '.join(manifest.shards)} tokens, not of data.seq_len "
                f"{self.seq_len}; prepare the text again with --seq-len {self.seq_len}"
            )
        if manifest.vocab_size != self.vocab_size:
            raise DataError(
                f"the text in {folder} was tokenised with a vocabulary of {manifest.vocab_size:,}, but data.vocab_size "
                f"is {self.vocab_size:,}; set data.vocab_size={manifest.vocab_size} in every stage, or prepare it again"
            )
        splits = manifest.shards[str(self.seq_len)]
        problems = self._vocabulary_problems(manifest)
        for shards in splits.values():
            problems += shard_problems(folder, shards, seq_len=self.seq_len, vocab_sha256=manifest.vocab_sha256)
        if problems:
            more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise unusable(f"the shards in {folder}", [*problems[:_SHOWN], *more], _HOW_TO_MEND_IT)
        self._counts = len(self._rows("train")), len(self._rows("val"))

    def _vocabulary_problems(self, manifest: Manifest) -> list[str]:
        try:
            same = self.vocabulary.digest == manifest.vocab_sha256
        except DataError as error:
            return [str(error)]
        return [] if same else [f"{VOCABULARY_FILE} was changed"]

    def train_dataset(self, *, seed: int = 0) -> MaskedPairs:
        return self._pairs("train", seed)

    def val_dataset(self) -> MaskedPairs:
        return self._pairs("val", _VALIDATION_SEED)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.folder / VOCABULARY_FILE, lowercase=self._manifest.lowercase)

    @property
    def folder(self) -> Path:
        return data_folder(self.root, ROOT_VARIABLE, _HOW_TO_GET_IT)

    @cached_property
    def _manifest(self) -> Manifest:
        try:
            return read_manifest(self.folder)
        except DataError as error:
            raise DataError(f"{error}\n{_HOW_TO_GET_IT}") from None

    def _rows(self, split: Literal["train", "val"]) -> TokenShards:
        length = str(self.seq_len)
        shards, per_group = self._manifest.shards[length][split], self._manifest.rows_per_group[length]
        return TokenShards(self.folder, shards, rows_per_group=per_group, cache_bytes=self.cache_bytes)

    def _pairs(self, split: Literal["train", "val"], seed: int) -> MaskedPairs:
        return MaskedPairs.of(
            self._rows(split),
            self.vocabulary,
            seq_len=self.seq_len,
            fraction=self.masked_fraction,
            max_predictions=self.max_predictions,
            seed=seed,
        )


_HOW_TO_MEND_IT = "Run lbzoo prepare bert again with the same options: it makes them anew."
_HOW_TO_GET_IT = f"""\
Make it of text files (documents apart by blank lines) or of parquet files with a column `text`:
  lbzoo prepare bert --input TEXTS --out FOLDER --vocab vocab.txt
and set data.root=FOLDER in every stage, or {ROOT_VARIABLE}=FOLDER in the environment. Wikipedia is to be had from
dumps.wikimedia.org; docs/bert.md says how to go on from there."""
