"""Errors a user can mend, and the nearest-name hint that every one of them shares.

An ``LbzooError`` is printed by the command line as it stands, without a traceback. Everything else that is raised is a
defect of lbzoo and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class LbzooError(Exception):
    """Something the user can mend. ``exit_code`` is the exit status of the command line."""

    exit_code = 1


class UsageError(LbzooError, ValueError):
    """A mistake in a recipe, an option, a name or a command line (exit code 2)."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that is not registered. ``known`` holds the names that are."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"no {kind} named '{name}'{did_you_mean(name, self.known)}")


class DivergedError(LbzooError):
    """The training has diverged (exit code 3). ``step``: the first bad optimizer step."""

    exit_code = 3

    def __init__(self, message: str, *, step: int = 0) -> None:
        self.step = step
        super().__init__(message)


class DataError(LbzooError):
    """Data that is missing, incomplete or broken."""


class CheckpointError(LbzooError):
    """A checkpoint that cannot be read or does not belong to this run."""


def nearest_name(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` most probably stands for, or None where nothing is close."""
    by_folded = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 30) -> str:
    """The end of an error message: the nearest known name, or the known names themselves (at most ``limit``)."""
    names = sorted(str(name) for name in known)
    nearest = nearest_name(word, names)
    if nearest is not None:
        return f"; did you mean '{nearest}'?"
    if not names:
        return ""
    shown = ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
    return f"; known: {shown}"


def import_hint(module: str) -> str:
    """What to do about a module that cannot be imported although its file lies here: "; ..." or nothing."""
    top = module.partition(".")[0]
    found = next((path for path in (Path(f"{top}.py"), Path(top)) if path.exists()), None)
    if found is None:
        return ""
    return f"; {found} lies here: set PYTHONPATH=. or, if it registers its components, list it in `plugins:`"
