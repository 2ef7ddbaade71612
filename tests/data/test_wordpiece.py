"""WordPiece: ids as BERT's own tokenizer gives them, vocabularies that are the same every time, and bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lbzoo.data.wordpiece import (
    SPECIAL_TOKENS,
    Vocabulary,
    read_vocabulary,
    refuse_unknown,
    saved_vocabulary,
    train_vocabulary,
)
from lbzoo.errors import DataError, UsageError

TEXT = ["The cat sat on the mat. The cats sat.", "A dog, a cat and 23 mats!", "Sitting cats; catty remarks."] * 5


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(TEXT, 70)


def test_same_ids_as_transformers_tokenizer(vocabulary: Vocabulary, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary.save_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXT, "Unseen wörds, naïve café", "", "x" * 200):
        (ours,) = vocabulary.encode([text])
        assert ours.ids == theirs(text, add_special_tokens=False).input_ids


def test_longest_match_first_by_hand() -> None:
    vocabulary = Vocabulary((*SPECIAL_TOKENS, "un", "##aff", "##able", "##a", "una"))
    (encoding,) = vocabulary.encode(["Unaffable un zz"])
    assert encoding.tokens == ["[UNK]", "un", "[UNK]"]  # una leaves ffable, for which there is no piece
    (encoding,) = Vocabulary((*SPECIAL_TOKENS, "un", "##aff", "##able", "##a")).encode(["unaffable"])
    assert encoding.tokens == ["un", "##aff", "##able"]
    assert encoding.offsets == [(0, 2), (2, 5), (5, 9)]


def test_training_is_the_same_in_every_process(vocabulary: Vocabulary) -> None:
    code = f"from lbzoo.data.wordpiece import train_vocabulary as t; print(t({TEXT!r}, 70).digest)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == vocabulary.digest
    assert len(vocabulary) == 70
    assert vocabulary.tokens[:5] == SPECIAL_TOKENS
    assert {"the", "cat"} <= set(vocabulary.tokens)


def test_a_file_and_back(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocab.txt")
    assert read_vocabulary(tmp_path / "vocab.txt") == vocabulary
    assert read_vocabulary(tmp_path / "vocab.txt", lowercase=False).digest != vocabulary.digest


@pytest.mark.parametrize("lowercase", [True, False])
def test_what_transformers_saved(lowercase: bool, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """In one file, or as it used to be in two; no tokenizer, or one of another kind, says nothing."""
    assert saved_vocabulary(tmp_path) is None
    wanted = Vocabulary(vocabulary.tokens, lowercase)
    wanted.save_tokenizer(tmp_path)
    assert saved_vocabulary(tmp_path) == wanted
    (tmp_path / "tokenizer.json").unlink()
    wanted.save(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    assert saved_vocabulary(tmp_path) == wanted
    for content in ("", "[]", '{"model": {"vocab": [["a", 0.1]]}, "normalizer": null}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert saved_vocabulary(tmp_path) is None


def test_a_line_ends_nowhere_else(tmp_path: Path) -> None:
    """Tokens that are spaces or line ends to Python, though not to BERT's tokenizer, shift no ids."""
    odd = Vocabulary((*SPECIAL_TOKENS, "\u2028", "\x85", "\x1c", "\u3000", "the"))
    odd.save(tmp_path / "vocab.txt")
    assert read_vocabulary(tmp_path / "vocab.txt") == odd
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(odd.tokens).encode())
    assert read_vocabulary(tmp_path / "vocab.txt") == odd


def test_what_sets_two_apart(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.tokens
    assert vocabulary.difference(Vocabulary(tokens)) == ""
    assert vocabulary.difference(Vocabulary(tokens[:-1])) == "70 tokens against 69"
    changed = Vocabulary((*tokens[:9], "zebra", *tokens[10:]))
    assert vocabulary.difference(changed) == f"token 9 is '{tokens[9]}' in one and 'zebra' in the other"
    assert vocabulary.difference(Vocabulary(tokens, lowercase=False)) == "one lower-cases text, the other does not"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[PAD]\n[UNK]\nthe\n", r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ("[PAD]\n\n", r"vocab.txt:2: an empty line"),
        ("[PAD]\nthe\ncat\nthe\n", r"vocab.txt:4: 'the' stands in line 2 already"),
    ],
)
def test_files_that_are_no_vocabulary(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_vocabulary(tmp_path / "vocab.txt")


def test_a_vocabulary_that_knows_nothing_is_refused(vocabulary: Vocabulary) -> None:
    nothing = Vocabulary((*SPECIAL_TOKENS, "привет", "мир"))
    with pytest.raises(DataError, match=r"vocab.txt makes \[UNK\] of 100 % of this text's tokens"):
        refuse_unknown(nothing, TEXT, "vocab.txt")
    refuse_unknown(vocabulary, TEXT, "vocab.txt")


def test_too_small_for_the_characters() -> None:
    with pytest.raises(UsageError, match="no room for the text's characters: "):
        train_vocabulary(TEXT, 20)
    with pytest.raises(DataError, match="no text"):
        train_vocabulary([" \n"], 100)
