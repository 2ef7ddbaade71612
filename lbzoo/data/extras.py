"""Libraries that only some data sets and tasks need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lbzoo.errors import LbzooError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports from an optional dependency: an error that names the extra where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LbzooError(f"the package {error.name} is not installed: pip install 'lbzoo[{name}]'") from error
