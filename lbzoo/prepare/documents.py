"""Documents from text files, where blank lines stand between them, and from parquet files with a column ``text``.

A corpus is read in pieces of a few ten megabytes, whatever the number of processes: what is drawn at random depends on
a document's piece and its place in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lbzoo.data.extras import extra
from lbzoo.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PIECE_BYTES = 32 << 20
TEXT_SUFFIXES = (".txt", ".text", "")
PARQUET_SUFFIX, TEXT_COLUMN = ".parquet", "text"
LONGEST_DOCUMENT = 16 << 20  # bytes; more is a file without blank lines
_NO_UTF8 = "no UTF-8 text"

_SENTENCE_END = re.compile(r"""(?<=[.!?]["')\]]) +(?=["'(\[]?[A-Z0-9])|(?<=[.!?]) +(?=["'(\[]?[A-Z0-9])""")


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes ``begin`` to ``end`` of a text file, row groups of a parquet file."""

    path: Path
    begin: int
    end: int

    @property
    def is_parquet(self) -> bool:
        return self.path.suffix == PARQUET_SUFFIX


@dataclass(frozen=True)
class RawDocument:
    """A document's text, or what is wrong with it. ``place()`` is file:line, or file:row, both from 1."""

    place: Callable[[], str]
    text: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Corpus:
    """The pieces of all files, in order. ``size`` counts bytes of text, as far as it is known without reading it."""

    files: dict[str, int]
    pieces: list[Piece]
    size: int


def find_corpus(folder: Path) -> Corpus:
    """The text and parquet files in a folder and below it, or one file; hidden ones are left out.

    Raises DataError where there are none, or nothing is in them.
    """
    if not folder.exists():
        raise DataError(f"there is no '{folder}'")
    root = folder if folder.is_dir() else folder.parent
    entries = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    files = [path for path in entries if path.is_file() and not _is_hidden(path.relative_to(root))]
    taken = [path for path in files if path.suffix in (*TEXT_SUFFIXES, PARQUET_SUFFIX)]
    if not taken:
        others = sorted({path.suffix for path in files})
        found = f"only files that end in {', '.join(others)}" if others else "no files"
        raise DataError(f"{folder} holds {found}; text is read from .txt files, and from .parquet files")
    pieces, size = [], 0
    for path in taken:
        parts, length = _parquet_pieces(path) if path.suffix == PARQUET_SUFFIX else _text_pieces(path)
        pieces += parts
        size += length
    if not pieces:
        raise DataError(f"there is no text in {folder}: {len(taken)} files, all empty")
    return Corpus({str(path.relative_to(root)): path.stat().st_size for path in taken}, pieces, size)


def read_documents(piece: Piece) -> Iterator[RawDocument]:
    """The documents that begin in a piece; bad ones come with their problem. Raises DataError for a damaged file."""
    try:
        yield from _parquet_documents(piece) if piece.is_parquet else _text_documents(piece)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise DataError(f"cannot read {piece.path}: {error}") from error


def sentences(text: str) -> list[str]:
    """A document's sentences: a line is one, or several where it has full stops before capitals or digits."""
    found = [sentence.strip() for line in text.splitlines() for sentence in _SENTENCE_END.split(line)]
    return [sentence for sentence in found if sentence]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _text_pieces(path: Path) -> tuple[list[Piece], int]:
    size = path.stat().st_size
    return [Piece(path, begin, min(begin + PIECE_BYTES, size)) for begin in range(0, size, PIECE_BYTES)], size


def _text_documents(piece: Piece) -> Iterator[RawDocument]:
    """The documents whose blank line before them begins in the piece; the file's first one has none."""
    with piece.path.open("rb") as file:
        begin = _line_begin(file, piece.begin)
        file.seek(begin)
        lines = _Lines(piece.path, begin)
        block: list[bytes] = []
        held = length = first = 0
        inside = begin == 0  # after the blank line that the first document of this piece follows
        for line in file:
            if not line.strip():
                if length:
                    yield _decoded(block, length, first, lines)
                    block, length = [], 0
                inside = held < piece.end - begin
                if not inside:
                    return
            elif inside:
                first = first if length else lines.read
                length += len(line)
                block += [line] if length <= LONGEST_DOCUMENT else []
            held += len(line)
            lines.read += 1
        if length:
            yield _decoded(block, length, first, lines)


@dataclass
class _Lines:
    """Numbers of lines; those before ``begin`` are counted only if somebody asks."""

    path: Path
    begin: int
    read: int = 0
    _before: int | None = None

    def place(self, line: int) -> str:
        if self._before is None:
            with self.path.open("rb") as file:
                self._before = _count_lines(file, self.begin)
        return f"{self.path}:{self._before + line + 1}"


def _decoded(block: list[bytes], length: int, first: int, lines: _Lines) -> RawDocument:
    if length > LONGEST_DOCUMENT:
        problem = f"longer than {LONGEST_DOCUMENT >> 20} MiB: blank lines stand between documents"
        return RawDocument(partial(lines.place, first), problem=problem)
    content = b"".join(block)
    try:
        return RawDocument(partial(lines.place, first), content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first + content.count(b"\n", 0, error.start)
        return RawDocument(partial(lines.place, line), problem=_NO_UTF8)


def _line_begin(file: IO[bytes], begin: int) -> int:
    """Where the first line begins that begins at ``begin`` or later."""
    if begin == 0:
        return 0
    file.seek(begin - 1)
    file.readline()
    return file.tell()


def _count_lines(file: IO[bytes], end: int) -> int:
    count, left = 0, end
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        count += block.count(b"\n")
        left -= len(block)
    return count


def _parquet_pieces(path: Path) -> tuple[list[Piece], int]:
    with extra("text"):
        import pyarrow.parquet as pq
    try:
        metadata, schema = pq.read_metadata(path), pq.read_schema(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no parquet file: {error}") from error
    if TEXT_COLUMN not in schema.names:
        raise DataError(f"{path} has no column '{TEXT_COLUMN}'; it has {', '.join(schema.names) or 'none'}")
    pieces, size, begin, held = [], 0, 0, 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= PIECE_BYTES or group == metadata.num_row_groups - 1:
            pieces.append(Piece(path, begin, group + 1))
            size, begin, held = size + held, group + 1, 0
    return pieces, size


def _parquet_documents(piece: Piece) -> Iterator[RawDocument]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(piece.path) as file:
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.begin))
        for group in range(piece.begin, piece.end):
            column = file.read_row_group(group, columns=[TEXT_COLUMN], use_threads=False).column(TEXT_COLUMN)
            for value in column:
                row += 1
                yield _parquet_document(value, f"{piece.path}:{row}".__str__)


def _parquet_document(value: pa.Scalar, place: Callable[[], str]) -> RawDocument:
    try:
        text = value.as_py()
    except UnicodeDecodeError:  # parquet says that its strings are UTF-8, and nobody checks
        return RawDocument(place, problem=_NO_UTF8)
    if not isinstance(text, str):
        return RawDocument(place, problem="no text")
    if len(text) > LONGEST_DOCUMENT:
        return RawDocument(place, problem=f"longer than {LONGEST_DOCUMENT >> 20} MiB")
    return RawDocument(place, text)
