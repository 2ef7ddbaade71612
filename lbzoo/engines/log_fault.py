"""Logs that cannot be written, on a full disk for one, do not end a training: they say so once and leave a gap."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


class LogFault:
    """Of one log; ``what`` is its name in the warning."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._has_warned = False

    @contextmanager
    def forgiven(self) -> Iterator[None]:
        """Around what writes."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s cannot be written (%s): what is logged now is lost", self._what, error)

    def forgiving(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """``write`` as it is, but for its OSErrors."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self.forgiven():
                return write(*args, **kwargs)

        return guarded
