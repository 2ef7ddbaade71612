"""Tokenised sentence pairs on disk: the format that ``lbzoo prepare bert`` writes and the data set ``wikibooks`` reads.

    DIR/manifest.json      what there is: written last, so that a folder without it is unfinished
    DIR/vocab.txt
    DIR/128/train-00000.parquet ...  val-00000.parquet ...         and 512/ likewise

A row is a pair: ``tokens`` (bytes: little-endian integers of ``TOKEN_TYPE``), ``second_start`` and ``is_random``.
Bytes, since parquet takes longer to read lists of numbers. Row groups hold ``rows_per_group`` rows each, the last of a
file the rest, so that a row is found by arithmetic and read with its group alone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbzoo.data.extras import extra
from lbzoo.data.masked_pairs import PairRow
from lbzoo.data.sentence_pairs import SentencePair
from lbzoo.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

FORMAT = 1
MANIFEST, VOCABULARY_FILE = "manifest.json", "vocab.txt"
TOKEN_TYPE = "<u2"
LARGEST_VOCABULARY = LONGEST_SEQUENCE = 1 << 16
_GROUP_TOKENS = 1 << 17  # a quarter of a MiB of tokens: read in well under a millisecond
_OPEN_FILES = 64
_SEQ_LEN, _DIGEST = b"lbzoo.seq_len", b"lbzoo.vocab_sha256"
_COLUMNS = ["tokens", "second_start", "is_random"]
_DAMAGE = (OSError, ValueError, LookupError, TypeError, NotImplementedError)  # what pyarrow raises for damaged files


@dataclass(frozen=True)
class ShardFile:
    """A file of pairs, relative to the prepared folder; ``bytes`` is its size."""

    file: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. ``shards[seq_len][split]``, the sequence length in words, as JSON has it."""

    vocab_size: int
    vocab_sha256: str
    lowercase: bool
    seed: int
    rows_per_group: dict[str, int]
    shards: dict[str, dict[str, list[ShardFile]]]
    documents: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_at: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        beside = folder / f".{MANIFEST}.tmp"
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        beside.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError where there is none, or one that this version cannot read."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = " (it was not prepared to the end)" if folder.is_dir() and any(folder.iterdir()) else ""
        raise DataError(f"{folder} holds no {MANIFEST}{unfinished}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not of format {FORMAT}, which this version of lbzoo reads: prepare the text again")
    try:
        content["shards"] = {
            seq_len: {split: [ShardFile(**shard) for shard in shards] for split, shards in splits.items()}
            for seq_len, splits in content["shards"].items()
        }
        return Manifest(**content)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def rows_per_group(seq_len: int) -> int:
    return max(_GROUP_TOKENS // seq_len, 1)


def write_shard(path: Path, pairs: Sequence[SentencePair], *, seq_len: int, vocab_sha256: str) -> None:
    """Write a file of pairs; it has its name only once it is whole."""
    with extra("text"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    import numpy as np

    columns = {
        "tokens": pa.array([np.asarray(pair.tokens, TOKEN_TYPE).tobytes() for pair in pairs], pa.binary()),
        "second_start": pa.array([pair.second_start for pair in pairs], pa.uint16()),
        "is_random": pa.array([pair.is_random for pair in pairs], pa.bool_()),
    }
    facts = {_SEQ_LEN: str(seq_len), _DIGEST: vocab_sha256, b"lbzoo.token_type": TOKEN_TYPE}
    table = pa.table(columns).replace_schema_metadata(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    pq.write_table(
        table,
        beside,
        row_group_size=rows_per_group(seq_len),
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,  # else a flipped bit may be another token
    )
    beside.replace(path)


def shard_problems(folder: Path, shards: Iterable[ShardFile], *, seq_len: int, vocab_sha256: str) -> list[str]:
    """What is wrong with the files, a line each: missing, cut off, of another length or another vocabulary."""
    problems = []
    for shard in shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{path} is missing")
        elif size != shard.bytes:
            problems.append(f"{path} has {size:,} bytes, not the {shard.bytes:,} that it was written with")
        else:
            problems += _content_problems(path, shard, seq_len, vocab_sha256)
    return problems


def _content_problems(path: Path, shard: ShardFile, seq_len: int, vocab_sha256: str) -> list[str]:
    try:
        with _open(path) as file:
            facts, columns = file.schema_arrow.metadata or {}, file.schema_arrow.names
            rows = file.metadata.num_rows
    except DataError as error:
        return [str(error)]
    length, digest = (facts.get(key, b"").decode(errors="replace") for key in (_SEQ_LEN, _DIGEST))
    if not length or not digest or columns != _COLUMNS:
        return [f"{path} was not written by lbzoo prepare, or is damaged"]
    if length != str(seq_len):
        return [f"{path} holds sequences of {length} tokens, not of {seq_len}"]
    if digest != vocab_sha256:
        return [f"{path} was tokenised with another vocabulary than {VOCABULARY_FILE}"]
    return [] if rows == shard.rows else [f"{path} holds {rows:,} pairs, not {shard.rows:,}"]


class TokenShards:
    """The pairs of several files, by number over all of them.

    Row groups are read as they are needed and the ones used last are kept, up to ``cache_bytes`` in each process. Files
    are opened when they are read, so an object that was sent to a loader process shares nothing with this one.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardFile], *, rows_per_group: int, cache_bytes: int) -> None:
        self.folder, self.shards = folder, list(shards)
        self.rows_per_group, self.cache_bytes = rows_per_group, cache_bytes
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._cached = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "_files": OrderedDict(), "_cached": 0}

    def read(self, numbers: Sequence[int]) -> list[PairRow]:
        """The pairs in the order that was asked for; each row group is read once."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for place, number in enumerate(numbers):
            shard = bisect_right(self._ends, number)
            local = number - (self._ends[shard - 1] if shard else 0)
            group, row = divmod(local, self.rows_per_group)
            wanted[shard, group].append((place, row))
        found: dict[int, PairRow] = {}
        for key, rows in wanted.items():
            group_rows = self._group(*key)
            for place, row in rows:
                found[place] = group_rows.row(row)
        return [found[place] for place in range(len(numbers))]

    def _group(self, shard: int, group: int) -> _Group:
        key = (shard, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        read = self._groups[key] = _Group.of(self._read(shard, group))
        self._cached += read.size
        while self._cached > self.cache_bytes and len(self._groups) > 1:
            self._cached -= self._groups.popitem(last=False)[1].size
        return read

    def _read(self, shard: int, group: int) -> pa.Table:
        path = self.folder / self.shards[shard].file
        try:
            return self._file(shard, path).read_row_group(group, use_threads=False)
        except _DAMAGE as error:
            raise DataError(
                f"cannot read row group {group} of {path}: {error}; take the file away and run lbzoo prepare bert "
                "again with the same options"
            ) from error

    def _file(self, shard: int, path: Path) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = _open(path)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]


@dataclass(frozen=True)
class _Group:
    """A row group as flat arrays: row i has ``tokens[offsets[i]:offsets[i + 1]]``."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.integer]
    second_starts: NDArray[np.integer]
    are_random: NDArray[np.bool_]

    @classmethod
    def of(cls, table: pa.Table) -> _Group:
        import numpy as np

        column = table.column("tokens").combine_chunks()
        column = column.chunk(0) if hasattr(column, "chunk") else column
        _, offsets, content = column.buffers()
        of_rows = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        return cls(
            np.frombuffer(content, TOKEN_TYPE),
            of_rows // np.dtype(TOKEN_TYPE).itemsize,
            table.column("second_start").to_numpy(),
            table.column("is_random").to_numpy(),
        )

    @property
    def size(self) -> int:
        return self.tokens.nbytes + self.offsets.nbytes + self.second_starts.nbytes + self.are_random.nbytes

    def row(self, number: int) -> PairRow:
        tokens = self.tokens[self.offsets[number] : self.offsets[number + 1]]
        return PairRow(tokens, int(self.second_starts[number]), bool(self.are_random[number]))


def _open(path: Path) -> pq.ParquetFile:
    with extra("text"):
        import pyarrow.parquet as pq
    try:
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except _DAMAGE as error:
        raise DataError(f"{path} is no parquet file: {error}") from error
