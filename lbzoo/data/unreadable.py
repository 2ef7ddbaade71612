"""Images that cannot be read: each is replaced by the next one, counted and remembered, and too many are an error."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lbzoo.errors import DataError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Unreadable:
    """Which of ``count`` images could not be read, shared by all loader processes of a rank: a byte for each image.

    More than the part ``allowed`` of those that the rank sees in an epoch, one of ``ranks`` equal shares, is an error.
    """

    def __init__(self, count: int, allowed: float, path_of: Callable[[int], Path]) -> None:
        self.count, self.allowed, self.ranks = count, allowed, 1
        self.path_of = path_of
        self._found = multiprocessing.Value("q", 0)
        self._marks = multiprocessing.RawArray("B", count)

    def __len__(self) -> int:
        return int(self._found.value)

    def indices(self) -> list[int]:
        """Those found so far."""
        return [index for index, mark in enumerate(bytes(self._marks)) if mark]

    def read(self, index: int, decode: Callable[[Path], T]) -> tuple[T, int]:
        """The image and its index: where it cannot be read, those of the next one that can.

        Which one that is depends on the files alone, so that a batch holds the same images on any number of devices.
        """
        for offset in range(self.count):
            candidate = (index + offset) % self.count
            if self._marks[candidate]:
                continue
            path = self.path_of(candidate)
            try:
                return decode(path), candidate
            except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say that a file is broken
                self._add(candidate, path, str(error).replace(f" '{path}'", ""))
        raise DataError(f"none of the {self.count} images can be read, the last is {self.path_of(index)}")

    def _add(self, index: int, path: Path, reason: str) -> None:
        with self._found.get_lock():
            if self._marks[index]:
                return
            self._marks[index] = 1
            self._found.value += 1
            found = int(self._found.value)
        if found > self.allowed * self.count / self.ranks:
            raise DataError(self._too_many(found, path, reason))
        log.warning("unreadable image number %d, replaced by the next: %s: %s", found, _shown(path), reason)

    def _too_many(self, found: int, path: Path, reason: str) -> str:
        what = f"cannot read the image {_shown(path)}: {reason}"
        if self.allowed == 0:
            return f"{what}; replace the file, or allow some to be replaced by the next image: data.max_unreadable=0.01"
        seen = f"{self.count:,}" if self.ranks == 1 else f"{self.count // self.ranks:,} of this rank's"
        return (
            f"{what}; with it {found} of {seen} images cannot be read, more than the {self.allowed:.2%} that "
            "data.max_unreadable allows: the files are damaged, or not where they seem to be"
        )


def _shown(path: Path) -> str:
    """The name for a message: its bytes need be no UTF-8, what reads messages may need it."""
    return str(path).encode(errors="backslashreplace").decode()
