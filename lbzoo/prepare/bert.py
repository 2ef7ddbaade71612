"""Text into what BERT is pretrained on: ``lbzoo prepare bert``.

Two passes. The first tokenises the corpus piece by piece and deals the documents out to shards at random; the second
makes sentence pairs of each shard's documents, for every sequence length, and writes them shuffled. So the text is
tokenised once, neighbours in a shard are strangers, and a second sentence comes from anywhere in the corpus.

Everything is a function of the text, the vocabulary and the seed. What is finished stays when the program is stopped,
and is not done again; the manifest comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lbzoo.data.rng import stable_rng
from lbzoo.data.sentence_pairs import sentence_pairs
from lbzoo.data.token_shards import (
    LARGEST_VOCABULARY,
    LONGEST_SEQUENCE,
    MANIFEST,
    VOCABULARY_FILE,
    Manifest,
    ShardFile,
    read_manifest,
    rows_per_group,
    shard_problems,
    write_shard,
)
from lbzoo.data.wordpiece import Vocabulary, read_vocabulary, refuse_unknown, train_vocabulary
from lbzoo.errors import DataError, LbzooError, UsageError
from lbzoo.prepare.documents import Corpus, find_corpus, read_documents
from lbzoo.prepare.jobs import Job, Progress, default_processes, run_jobs
from lbzoo.prepare.tokenized_pieces import Dealing, PieceFacts, read_facts, read_shard, tokenize_piece

WORK = ".unfinished"
SETTINGS = "settings.json"
SHARD_BYTES = 64 << 20  # of text in a shard
_VOCABULARY_BYTES = 256 << 20  # of text that a vocabulary is made from
_SAMPLE = 200  # documents whose words the vocabulary should know


@dataclass(frozen=True)
class BertText:
    """What to make of a text. ``seq_lens`` count tokens; ``validation`` is a part of the documents.

    ``vocabulary`` is a file or, to make one from the text, a number of tokens. ``shard_bytes``: of text in a shard.
    """

    source: Path
    out: Path
    vocabulary: Path | int
    seq_lens: tuple[int, ...] = (128, 512)
    lowercase: bool = True
    validation: float = 0.005
    seed: int = 0
    shard_bytes: int = SHARD_BYTES


def prepare_bert(
    text: BertText, *, processes: int | None = None, progress: Progress = lambda what, done, total: None
) -> Manifest:
    """Make ``text.out`` of ``text.source`` and return its manifest; a folder that is finished already is only checked.

    Raises UsageError for options that do not fit, also not to what the folder holds already, DataError for a text or
    a vocabulary that cannot be used, and LbzooError where the folder cannot be written to.
    """
    _check(text)
    try:
        return _prepare(text, processes or default_processes(), progress)
    except OSError as error:  # a full disk
        raise LbzooError(f"{text.out}: {error}; what is finished stays, and the same command goes on") from error


def _prepare(text: BertText, processes: int, progress: Progress) -> Manifest:
    corpus = find_corpus(text.source)
    work = text.out / WORK
    settings = _settings(text, corpus)
    if (done := _finished(text, settings)) is not None:
        return done
    _begin(work, settings)
    vocabulary = _vocabulary(text, corpus)
    (text.out / MANIFEST).unlink(missing_ok=True)
    dealing = Dealing(text.seed, max(-(-corpus.size // text.shard_bytes), 1) + 1, text.validation)
    pieces = [work / f"piece-{number:05}.arrow" for number in range(len(corpus.pieces))]
    tokenize: list[Job] = [
        partial(tokenize_piece, piece, number, vocabulary, dealing, path)
        for number, (piece, path) in enumerate(zip(corpus.pieces, pieces, strict=True))
        if not path.is_file()
    ]
    run_jobs("tokenising", tokenize, processes, progress)
    facts = PieceFacts()
    for path in pieces:
        facts.add(read_facts(path))
    if facts.documents < 2:
        skipped = "; ".join(["", *facts.skipped_at])
        raise DataError(f"{text.source} holds {facts.documents} documents, and pairs of sentences need two{skipped}")
    make: list[Job] = [
        partial(_make_shard, text, vocabulary, dealing, pieces, shard, seq_len)
        for shard in range(dealing.shards)
        for seq_len in text.seq_lens
        if not (text.out / _shard_file(dealing, shard, seq_len)).is_file()
    ]
    run_jobs("making pairs", make, processes, progress)
    manifest = _manifest(text, vocabulary, dealing, facts, settings)
    manifest.save(text.out)
    shutil.rmtree(work)
    return manifest


def _check(text: BertText) -> None:
    if not text.seq_lens or min(text.seq_lens) < 8 or len(set(text.seq_lens)) < len(text.seq_lens):
        raise UsageError(f"sequence lengths are different numbers of tokens from 8, got {list(text.seq_lens)}")
    if not 0 < text.validation < 1:
        raise UsageError(f"the part for validation must lie between 0 and 1, got {text.validation}")
    if isinstance(text.vocabulary, int) and text.vocabulary > LARGEST_VOCABULARY:
        raise UsageError(f"a vocabulary has at most {LARGEST_VOCABULARY:,} tokens, got {text.vocabulary:,}")
    if max(text.seq_lens) > LONGEST_SEQUENCE:
        raise UsageError(f"a sequence has at most {LONGEST_SEQUENCE:,} tokens, got {max(text.seq_lens):,}")
    if not 0 <= text.seed < 1 << 32:
        raise UsageError(f"the seed must lie between 0 and 2^32 - 1, got {text.seed}")
    if text.out.resolve().is_relative_to(text.source.resolve()):
        raise UsageError(f"{text.out} lies in the folder of the text itself; name one outside of it for the shards")
    if text.out.exists() and not text.out.is_dir():
        raise UsageError(f"{text.out} is a file; name a folder for the shards")


def _settings(text: BertText, corpus: Corpus) -> dict[str, Any]:
    """Everything that the result depends on, as JSON has it."""
    vocabulary: Any = text.vocabulary
    if isinstance(vocabulary, Path):
        vocabulary = read_vocabulary(vocabulary, lowercase=text.lowercase).digest
    return {
        "vocabulary": vocabulary,
        "seq_lens": list(text.seq_lens),
        "lowercase": text.lowercase,
        "validation": text.validation,
        "seed": text.seed,
        "shard_bytes": text.shard_bytes,
        "files": corpus.files,
    }


def _finished(text: BertText, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that holds all that is wanted; files that are damaged are taken away.

    The vocabulary is one of them: without it the shards say nothing.
    """
    if not (text.out / MANIFEST).is_file():
        return None
    manifest = read_manifest(text.out)
    _refuse_other_settings(text.out, manifest.settings, settings)
    damaged = [
        shard.file
        for seq_len, splits in manifest.shards.items()
        for shards in splits.values()
        for shard in shards
        if shard_problems(text.out, [shard], seq_len=int(seq_len), vocab_sha256=manifest.vocab_sha256)
    ]
    if not _is_vocabulary(text.out / VOCABULARY_FILE, manifest):
        damaged.append(VOCABULARY_FILE)
    for file in damaged:
        (text.out / file).unlink(missing_ok=True)
    return None if damaged else manifest


def _is_vocabulary(path: Path, manifest: Manifest) -> bool:
    """Whether the shards were made with what this file holds."""
    try:
        return read_vocabulary(path, lowercase=manifest.lowercase).digest == manifest.vocab_sha256
    except DataError:
        return False


def _begin(work: Path, settings: dict[str, Any]) -> None:
    """The folder of unfinished work; it must have been begun with the same settings."""
    file = work / SETTINGS
    if file.is_file():
        _refuse_other_settings(work.parent, json.loads(file.read_text(encoding="utf-8")), settings)
        return
    out = work.parent
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} holds other files; name a new folder for the shards")
    work.mkdir(parents=True, exist_ok=True)
    beside = work / f".{SETTINGS}.tmp"
    beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def _refuse_other_settings(out: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        changes = "; ".join(f"{key} was {_brief(earlier.get(key))} and is {_brief(now[key])}" for key in differing)
        raise UsageError(f"{out} was begun with something else: {changes}. Name another folder, or remove this one")


def _brief(value: Any) -> str:
    return f"{len(value)} files of {sum(value.values()):,} bytes" if isinstance(value, dict) else str(value)


def _vocabulary(text: BertText, corpus: Corpus) -> Vocabulary:
    """The vocabulary, as ``vocab.txt`` beside the shards; it must know the text's words."""
    path = text.out / VOCABULARY_FILE
    if isinstance(text.vocabulary, Path):
        vocabulary, name = read_vocabulary(text.vocabulary, lowercase=text.lowercase), str(text.vocabulary)
        if len(vocabulary) > LARGEST_VOCABULARY:
            raise DataError(f"{name} has {len(vocabulary):,} tokens, more than {LARGEST_VOCABULARY:,}")
        refuse_unknown(vocabulary, _texts(corpus, documents=_SAMPLE), name)
    elif path.is_file():
        return read_vocabulary(path, lowercase=text.lowercase)  # made before this program was stopped
    else:
        vocabulary = train_vocabulary(
            _texts(corpus, each=_VOCABULARY_BYTES // len(corpus.pieces)), text.vocabulary, lowercase=text.lowercase
        )
    beside = path.with_suffix(".tmp")
    vocabulary.save(beside)
    beside.replace(path)
    return vocabulary


def _texts(corpus: Corpus, *, documents: int | None = None, each: int | None = None) -> list[str]:
    """The first good documents of the corpus: so many in all, or of each piece so many characters."""
    texts: list[str] = []
    for piece in corpus.pieces:
        length = 0
        for document in read_documents(piece):
            if not document.problem:
                texts.append(document.text)
                length += len(document.text)
            if len(texts) == documents or (each is not None and length >= each):
                break
        if len(texts) == documents:
            break
    return texts


def _shard_file(dealing: Dealing, shard: int, seq_len: int) -> str:
    if shard == dealing.shards - 1:
        return f"{seq_len}/val-00000.parquet"
    return f"{seq_len}/train-{shard:05}.parquet"


def _make_shard(
    text: BertText, vocabulary: Vocabulary, dealing: Dealing, pieces: Sequence[Path], shard: int, seq_len: int
) -> None:
    documents = read_shard(pieces, shard)
    rng = stable_rng(text.seed, seq_len, shard)
    pairs = list(sentence_pairs(documents, seq_len, vocabulary, rng))
    shuffled = [pairs[number] for number in rng.permutation(len(pairs))]
    path = text.out / _shard_file(dealing, shard, seq_len)
    write_shard(path, shuffled, seq_len=seq_len, vocab_sha256=vocabulary.digest)


def _manifest(
    text: BertText, vocabulary: Vocabulary, dealing: Dealing, facts: PieceFacts, settings: dict[str, Any]
) -> Manifest:
    shards = {
        str(seq_len): {
            "train": [_counted(text.out, _shard_file(dealing, n, seq_len)) for n in range(dealing.shards - 1)],
            "val": [_counted(text.out, _shard_file(dealing, dealing.shards - 1, seq_len))],
        }
        for seq_len in text.seq_lens
    }
    for seq_len, splits in shards.items():
        for split, files in splits.items():
            if not sum(file.rows for file in files):
                raise DataError(
                    f"{facts.documents:,} documents left none for the {split} set at {seq_len} tokens; "
                    "take more text, or another part for validation"
                )
    return Manifest(
        vocab_size=len(vocabulary),
        vocab_sha256=vocabulary.digest,
        lowercase=text.lowercase,
        seed=text.seed,
        rows_per_group={str(seq_len): rows_per_group(seq_len) for seq_len in text.seq_lens},
        shards=shards,
        settings=settings,
        **asdict(facts),
    )


def _counted(folder: Path, file: str) -> ShardFile:
    import pyarrow.parquet as pq

    path = folder / file
    return ShardFile(file, pq.read_metadata(path).num_rows, path.stat().st_size)
