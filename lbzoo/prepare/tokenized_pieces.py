"""A corpus between its two passes: the documents of a piece, tokenised and dealt out to shards.

One file a piece, with a record batch a shard, so that the second pass reads of each piece what it needs and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lbzoo.data.extras import extra
from lbzoo.data.rng import stable_uniform
from lbzoo.data.sentence_pairs import Document
from lbzoo.data.wordpiece import Vocabulary
from lbzoo.prepare.documents import Piece, RawDocument, read_documents, sentences

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

_DEALING = 3  # sets these random numbers apart from others of the same seed
_AT_ONCE = 256  # documents that are tokenised together
_SHOWN = 20  # skipped documents of a piece whose places are kept
_FACTS = b"lbzoo"


@dataclass
class PieceFacts:
    """What was found in a piece: documents taken, documents skipped by reason, and where the first of those stand."""

    documents: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_at: list[str] = field(default_factory=list)

    def skip(self, document: RawDocument, problem: str) -> None:
        self.skipped[problem] = self.skipped.get(problem, 0) + 1
        if len(self.skipped_at) < _SHOWN:
            self.skipped_at.append(f"{document.place()}: {problem}")

    def add(self, other: PieceFacts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        for problem, count in other.skipped.items():
            self.skipped[problem] = self.skipped.get(problem, 0) + count
        self.skipped_at += other.skipped_at[: _SHOWN - len(self.skipped_at)]


@dataclass(frozen=True)
class Dealing:
    """How documents are dealt out: the last of ``shards`` gets ``validation`` of them, the others equal chances."""

    seed: int
    shards: int
    validation: float

    def shards_of(self, piece: int, documents: int) -> NDArray[np.int64]:
        """The shard of each document of a piece: a function of the seed, the piece and the place in it."""
        import numpy as np

        places = np.arange(documents)
        held_out = stable_uniform(_DEALING, self.seed, piece, places, 0) < self.validation
        shard = (stable_uniform(_DEALING, self.seed, piece, places, 1) * (self.shards - 1)).astype(np.int64)
        return np.where(held_out, self.shards - 1, shard)


def tokenize_piece(piece: Piece, number: int, vocabulary: Vocabulary, dealing: Dealing, path: Path) -> None:
    """Write the file of a piece; it has its name only once it is whole."""
    with extra("text"):
        import pyarrow as pa
    import numpy as np

    facts = PieceFacts()
    documents = list(_tokenized(piece, vocabulary, facts))
    shards = dealing.shards_of(number, len(documents))
    schema = pa.schema({"tokens": pa.list_(pa.uint16()), "lengths": pa.list_(pa.int32())})
    facts.documents = len(documents)
    beside = path.with_suffix(".tmp")
    with pa.ipc.new_file(beside, schema.with_metadata({_FACTS: json.dumps(asdict(facts))})) as file:
        for shard in range(dealing.shards):
            file.write_batch(_batch([documents[at] for at in np.flatnonzero(shards == shard)], schema))
    beside.replace(path)


def read_facts(path: Path) -> PieceFacts:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return PieceFacts(**json.loads(pa.ipc.open_file(file).schema.metadata[_FACTS]))


def read_shard(paths: Sequence[Path], shard: int) -> list[Document]:
    """The documents that were dealt to a shard, in the order of the pieces."""
    import pyarrow as pa

    documents: list[Document] = []
    for path in paths:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(shard)
            for tokens, lengths in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                documents.append(_divided(tokens, lengths))
    return documents


def _tokenized(piece: Piece, vocabulary: Vocabulary, facts: PieceFacts) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, lengths of the sentences) of each good document."""
    waiting: list[tuple[RawDocument, list[str]]] = []
    for document in read_documents(piece):
        if document.problem:
            facts.skip(document, document.problem)
            continue
        waiting.append((document, sentences(document.text)))
        if len(waiting) == _AT_ONCE:
            yield from _encoded(waiting, vocabulary, facts)
            waiting = []
    yield from _encoded(waiting, vocabulary, facts)


def _encoded(
    documents: list[tuple[RawDocument, list[str]]], vocabulary: Vocabulary, facts: PieceFacts
) -> Iterator[tuple[list[int], list[int]]]:
    encodings = iter(vocabulary.encode([sentence for _, texts in documents for sentence in texts]))
    for document, texts in documents:
        ids = [encoding.ids for _, encoding in zip(texts, encodings, strict=False) if encoding.ids]
        if not ids:
            facts.skip(document, "no words in it")
            continue
        facts.tokens += sum(map(len, ids))
        yield [token for sentence in ids for token in sentence], [len(sentence) for sentence in ids]


def _batch(documents: list[tuple[list[int], list[int]]], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns = [pa.array([d[at] for d in documents], schema.field(at).type) for at in range(2)]
    return pa.record_batch(columns, schema=schema)


def _divided(tokens: list[int], lengths: list[int]) -> Document:
    document, begin = [], 0
    for length in lengths:
        document.append(tokens[begin : begin + length])
        begin += length
    return document
