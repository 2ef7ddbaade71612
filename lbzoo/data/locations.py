"""Where the files of a data set are: an option of the recipe, or a variable of the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lbzoo.errors import DataError


def data_folder(root: str | None, variable: str, how_to_get_it: str) -> Path:
    """``root``, or else what the environment's ``variable`` says. Raises DataError where neither is set."""
    chosen = root or os.environ.get(variable)
    if not chosen:
        raise DataError(f"there is no folder of data: neither data.root nor {variable} is set\n{how_to_get_it}")
    return Path(os.path.expanduser(chosen))


@contextmanager
def looking_at(what: str, how_to_get_it: str) -> Iterator[None]:
    """Around the first look at a folder: where the system refuses it, as without permission, that is a DataError."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise unusable(what, [problem], how_to_get_it) from error


def unusable(what: str, problems: Sequence[str], how_to_get_it: str) -> DataError:
    """The error that lists everything that is wrong with a folder, and says how it has to be."""
    return DataError("\n  ".join([f"{what} cannot be used:", *problems]) + f"\n{how_to_get_it}")
