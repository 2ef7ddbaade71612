"""CIFAR-10's files as torchvision keeps them: six pickles of bytes, written by Python 2.

A pickle can run any code when it is loaded. These need nothing but arrays, lists and text, and get nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from lbzoo.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
VAL_FILES = ("test_batch",)
NUM_CLASSES = 10
HEIGHT = WIDTH = 32


class Batch(NamedTuple):
    """Images [N, 32, 32, 3] and their labels [N]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_batch(path: Path) -> Batch:
    """The images of one file. Raises DataError that says what is wrong with it."""
    import numpy as np

    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(error.strerror or str(error)) from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise DataError(f"cannot be unpickled: {str(error) or type(error).__name__}") from error
    try:
        rows, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
    except (TypeError, LookupError, ValueError) as error:
        raise DataError("holds no b'data' and b'labels'") from error
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * HEIGHT * WIDTH:
        raise DataError(f"b'data' is {rows.dtype} of shape {list(rows.shape)}, not uint8 of [N, {3 * HEIGHT * WIDTH}]")
    if labels.shape != rows.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{len(rows)} images, but {labels.size} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise DataError(f"labels from {labels.min()} to {labels.max()}, not from 0 to {NUM_CLASSES - 1}")
    pixels = rows.reshape(-1, 3, HEIGHT, WIDTH).transpose(0, 2, 3, 1)
    return Batch(np.ascontiguousarray(pixels), labels.astype(np.int64))


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and Python's plain values, and refuses everything else by name."""

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        found = _harmless().get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no file of CIFAR-10 does")
        return found


def _harmless() -> dict[tuple[str, str], Callable[..., Any]]:
    """What an array is pickled with, under the names of numpy 1 and 2."""
    import _codecs

    import numpy as np
    from numpy._core import multiarray, numeric

    harmless: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _codecs.encode,
    }
    for core in ("numpy.core", "numpy._core"):
        harmless[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
        harmless[f"{core}.numeric", "_frombuffer"] = numeric._frombuffer  # type: ignore[attr-defined]  # private to numpy
    return harmless
