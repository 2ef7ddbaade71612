"""WordPiece vocabularies: read from a file, or made from a text, and the tokenizer that goes with them.

A vocabulary file is BERT's own: one token a line, its id the number of its line from 0.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lbzoo.data.extras import extra
from lbzoo.errors import DataError, UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PAD, UNKNOWN, CLASSIFY, SEPARATE, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_VOCABULARY = 30_522  # tokens of BERT's English vocabulary without upper case
_MOST_CHARACTERS = 1000  # of a vocabulary that is made from a text; rarer ones are unknown
_MOST_UNKNOWN = 0.5  # of a text's tokens: a vocabulary that knows fewer is another language's


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids. ``lowercase``: text is lower-cased, and stripped of its accents, first."""

    tokens: tuple[str, ...]
    lowercase: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> int:
        """The id of a token."""
        return self._ids[token]

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        return tuple(self[token] for token in SPECIAL_TOKENS)

    @cached_property
    def digest(self) -> str:
        """Equal for equal vocabularies, whatever file they came from."""
        content = "\n".join((*self.tokens, f"lowercase={self.lowercase}"))
        return hashlib.sha256(content.encode()).hexdigest()

    def difference(self, other: Vocabulary) -> str:
        """What sets the two apart, in words; nothing where they are equal."""
        if len(self) != len(other):
            return f"{len(self):,} tokens against {len(other):,}"
        for number, (own, theirs) in enumerate(zip(self.tokens, other.tokens, strict=True)):
            if own != theirs:
                return f"token {number} is '{own}' in one and '{theirs}' in the other"
        return "" if self.lowercase == other.lowercase else "one lower-cases text, the other does not"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids with BERT's rules; adds no special tokens, and knows where in the text each token stands."""
        with extra("text"):
            from tokenizers import Tokenizer
            from tokenizers.models import WordPiece
        tokenizer = Tokenizer(WordPiece(self._ids, unk_token=UNKNOWN, max_input_chars_per_word=100))
        _set_rules(tokenizer, self.lowercase)
        return tokenizer

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Ids and places of each text's tokens."""
        encodings: list[Encoding] = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings

    def save(self, path: Path) -> None:
        path.write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")

    def save_tokenizer(self, folder: Path) -> None:
        """Write what transformers' ``AutoTokenizer`` reads: with special tokens around one text or two."""
        with extra("text"):
            from transformers import BertTokenizer  # the fast one, in transformers 5

        BertTokenizer(vocab=self._ids, do_lower_case=self.lowercase).save_pretrained(folder)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


class HasVocabulary(ABC):
    """A data set of text that was cut into tokens: the vocabulary that a model trained on it goes with."""

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary: ...


def read_vocabulary(path: Path, *, lowercase: bool = True) -> Vocabulary:
    """Read a vocabulary file. Raises DataError where it is none, naming file and line."""
    try:
        # Not splitlines(), which also divides at characters that are tokens of some vocabularies.
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the vocabulary {path}: {error}") from error
    lines: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token.strip(" \t"):
            raise DataError(f"{path}:{number}: an empty line; a vocabulary has one token a line")
        if token in lines:
            raise DataError(f"{path}:{number}: '{token}' stands in line {lines[token]} already")
        lines[token] = number
    missing = [token for token in SPECIAL_TOKENS if token not in lines]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: it is no WordPiece vocabulary of BERT's")
    return Vocabulary(tuple(tokens), lowercase)


def saved_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a tokenizer that transformers saved; None where there is none of WordPiece that can be read."""
    try:
        if (folder / "tokenizer.json").is_file():
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            ids = content["model"]["vocab"]
            return Vocabulary(tuple(sorted(ids, key=ids.__getitem__)), bool(content["normalizer"]["lowercase"]))
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return read_vocabulary(folder / "vocab.txt", lowercase=bool(options.get("do_lower_case", True)))
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def train_vocabulary(texts: Iterable[str], size: int, *, lowercase: bool = True) -> Vocabulary:
    """A vocabulary of at most ``size`` tokens for these texts; the same for the same texts.

    tokenizers numbers the characters inside words as it meets them, in an order that differs from run to run, and
    breaks ties between merges by these numbers. Here they are numbered beforehand.
    """
    with extra("text"):
        from tokenizers import Tokenizer
        from tokenizers.models import WordPiece
        from tokenizers.trainers import WordPieceTrainer
    tokenizer = Tokenizer(WordPiece(unk_token=UNKNOWN))
    _set_rules(tokenizer, lowercase)
    kept = list(texts)
    counts: Counter[str] = Counter()
    for text in kept:
        counts.update(tokenizer.normalizer.normalize_str(text))
    by_frequency = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(by_frequency[:_MOST_CHARACTERS])
    fixed = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    if not alphabet:
        raise DataError("there is no text to make a vocabulary from")
    if size < len(fixed):
        raise UsageError(f"a vocabulary of {size} tokens has no room for the text's characters: {len(fixed)} or more")
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=fixed, limit_alphabet=len(alphabet), show_progress=False)
    tokenizer.train_from_iterator(kept, trainer)
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    return Vocabulary(tuple(sorted(ids, key=ids.__getitem__)), lowercase)


def refuse_unknown(vocabulary: Vocabulary, texts: list[str], name: str) -> None:
    """Raise DataError where the vocabulary knows hardly any of the texts' words."""
    unknown_id = vocabulary[UNKNOWN]
    ids = [token for encoding in vocabulary.encode(texts) for token in encoding.ids]
    unknown = ids.count(unknown_id)
    if ids and unknown > _MOST_UNKNOWN * len(ids):
        raise DataError(
            f"the vocabulary {name} makes {UNKNOWN} of {100 * unknown / len(ids):.0f} % of this text's tokens: it is "
            "another language's, or cased where lower-cased text is looked up in it, or damaged"
        )


def _set_rules(tokenizer: Tokenizer, lowercase: bool) -> None:
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
