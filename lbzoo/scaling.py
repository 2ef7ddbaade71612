"""Batch arithmetic, and the rules that carry hyperparameters from one batch size to another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, get_args

from lbzoo.errors import UsageError, did_you_mean

ScalingRule = Literal["sqrt", "linear"]


def accumulation(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank accumulates to one optimizer step: global / (micro x ranks).

    Raises UsageError where that is not whole, naming the nearest sizes that fit.
    """
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "world_size": world_size}
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} must be at least 1, got {size}")
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass == 0:
        return global_batch_size // per_pass

    below = global_batch_size // per_pass * per_pass
    choices = [_choice("global_batch_size", [below, below + per_pass])]
    if global_batch_size % world_size == 0:
        choices.append(_choice("micro_batch_size", _neighbours(micro_batch_size, global_batch_size // world_size)))
    if global_batch_size % micro_batch_size == 0:
        choices.append(_choice("number of devices", _neighbours(world_size, global_batch_size // micro_batch_size)))
    raise UsageError(
        f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {micro_batch_size} x "
        f"{world_size} device{'s' if world_size > 1 else ''} = {per_pass}; nearest that fit: {'; or '.join(choices)}"
    )


def steps_for_epochs(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps that show ``epochs`` times ``num_samples``: rounded up, over the whole run and not by epoch."""
    if epochs <= 0 or num_samples < 1 or global_batch_size < 1:
        raise UsageError(f"no steps in {epochs} epochs of {num_samples} samples at global batch {global_batch_size}")
    # As written in decimals: 1.1 epochs of 10 samples at batch 11 are one step, which binary floats make two.
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch_size)


def scaled_lr(lr: float, *, rule: ScalingRule, base_global_batch_size: int, global_batch_size: int) -> float:
    """``lr``, given for the base batch size, at another: times the ratio of the sizes, or its square root."""
    ratio = _ratio(base_global_batch_size, global_batch_size)
    if rule == "sqrt":
        return lr * math.sqrt(ratio)
    if rule == "linear":
        return lr * ratio
    raise UsageError(f"no learning-rate scaling rule '{rule}'{did_you_mean(rule, get_args(ScalingRule))}")


def scaled_warmup_epochs(epochs: float, *, base_global_batch_size: int, global_batch_size: int) -> float:
    """Warmup in epochs, or as a ratio of a run of fixed epochs, at another batch size: linear in it.

    The number of warmup steps stays what it was (LAMB tables 4 and 5).
    """
    return epochs * _ratio(base_global_batch_size, global_batch_size)


def _ratio(base: int, size: int) -> float:
    if base < 1 or size < 1:
        raise UsageError(f"batch sizes must be at least 1, got {size} and the base {base}")
    return size / base


def _neighbours(size: int, total: int) -> list[int]:
    """The divisors of ``total`` next to ``size``, one below and one above where there are such."""
    divisors = [part for low in range(1, math.isqrt(total) + 1) if total % low == 0 for part in (low, total // low)]
    below = max((part for part in divisors if part < size), default=None)
    above = min((part for part in divisors if part > size), default=None)
    return [part for part in (below, above) if part is not None]


def _choice(name: str, sizes: Iterable[int]) -> str:
    return f"{name} " + " or ".join(str(size) for size in sizes if size > 0)
