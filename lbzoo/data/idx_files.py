"""IDX files, MNIST's format: two zero bytes, a byte for the type, one for the number of dimensions, sizes, values."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from lbzoo.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNSIGNED_BYTES = 0x08


def find_idx(folder: Path, name: str) -> Path | None:
    """The file, or its packed form; None where there is neither."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, packed by gzip where its name ends so. Raises DataError."""
    import numpy as np

    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError("is no IDX file: it does not begin with two zero bytes")
    kind, dimensions = content[2], content[3]
    if kind != UNSIGNED_BYTES:
        raise DataError(f"holds values of type 0x{kind:02x}, not unsigned bytes (0x{UNSIGNED_BYTES:02x})")
    head = 4 + 4 * dimensions
    if len(content) < head:
        raise DataError(f"has {len(content)} bytes, fewer than the sizes of {dimensions} dimensions take")
    shape = np.frombuffer(content[4:head], ">u4").tolist()
    wanted = head + math.prod(shape)
    if len(content) != wanted:
        raise DataError(f"has {len(content):,} bytes, not the {wanted:,} that its head announces")
    return np.frombuffer(bytearray(content[head:]), np.uint8).reshape(shape)
