"""What callbacks keep from step to step, such as moving averages, as part of a checkpoint.

A callback has state if it overrides ``state_dict`` and ``load_state_dict``, as in Lightning. It is of plain values and
tensors, which is all that is ever read back. The first rank's is kept; ``state_dict`` is called on every rank, so a
callback whose ranks know different things can bring them together there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lbzoo.errors import LbzooError

_PLAIN = (bool, int, float, str, Tensor, type(None))


def states_of(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """By name. Raises LbzooError for a state that could not be read back."""
    states = {name: callback.state_dict() for name, callback in _named(callbacks)}
    for name, state in states.items():
        if (kind := _first_foreign(state)) is not None:
            raise LbzooError(f"callback {name}: its state_dict() holds a {kind}; checkpoints keep plain values and "
                             "tensors only")  # fmt: skip
    return {name: state for name, state in states.items() if state}


def restore_states(callbacks: Sequence[Callback], states: Mapping[str, Any]) -> None:
    """Give each callback its state; one that has none in the checkpoint begins anew."""
    for name, callback in _named(callbacks):
        if name in states:
            callback.load_state_dict(states[name])


def _named(callbacks: Sequence[Callback]) -> Iterator[tuple[str, Callback]]:
    """Those with state. Two of one class are told apart by their order."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        if type(callback).state_dict is not Callback.state_dict:
            name = type(callback).__qualname__
            seen[name] += 1
            yield (f"{name}.{seen[name]}" if seen[name] > 1 else name), callback


def _first_foreign(value: Any) -> str | None:
    """The type of the first part that is neither plain nor a tensor."""
    if isinstance(value, _PLAIN):
        return None
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        return type(value).__name__
    return next((kind for part in parts if (kind := _first_foreign(part)) is not None), None)
