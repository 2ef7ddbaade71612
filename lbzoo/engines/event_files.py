"""TensorBoard's event files cut back to a step, so that what is logged again after a resume stands there once.

TensorBoard itself can be told to drop what came after a step (``purge_step``), but other readers of the files cannot.
A file is a sequence of records: length (8 bytes), its checksum (4), the event, its checksum (4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LENGTH = struct.Struct("<Q")
_CHECKSUM = 4


def drop_events_after(folder: Path, step: int) -> None:
    """Rewrite the event files of a folder that hold something later, or a record that a kill or the disk has damaged.

    What follows a damaged record goes with it: where the next one begins is not known.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]  # ships no types

    for file in folder.glob("events.out.tfevents.*"):
        content = file.read_bytes()
        records: list[bytes] = []
        with suppress(DecodeError):
            for record, event in _records(content):
                if Event.FromString(event).step <= step:
                    records.append(record)
        kept = b"".join(records)
        if len(kept) != len(content):
            beside = file.with_name(f".{file.name}.tmp")
            beside.write_bytes(kept)
            beside.replace(file)


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(record, the event in it) in order; the last one only if it is whole."""
    start, head = 0, _LENGTH.size + _CHECKSUM
    while start + head <= len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        end = start + head + length + _CHECKSUM
        if end > len(content):
            return
        yield content[start:end], content[start + head : end - _CHECKSUM]
        start = end
