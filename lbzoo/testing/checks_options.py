"""Options: none is ignored, none is accepted that does not exist or cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lbzoo.testing.check import CheckFailure, check, expect, skip
from lbzoo.testing.example import Example, backward, weights
from lbzoo.testing.subject import Subject

# These choose an implementation of the same rule.
SAME_RULE = {"foreach", "fused", "capturable", "differentiable", "compile", "cautious_compile"}


@check()
def unknown_option(subject: Subject) -> None:
    """A misspelled option that is swallowed by **kwargs trains with the default, and the paper's number never comes."""
    word = "weigth_decay"
    try:
        subject.build(Example(), **{word: 0.1})
    except Exception as error:
        expect(word in str(error), f"the option '{word}' is refused, but not by name: {error}")
    else:
        raise CheckFailure(f"the option '{word}' was accepted")


@check()
def unknown_group_key(subject: Subject) -> None:
    """A misspelled key in a parameter group ("no decay for biases") is stored beside the others and never read."""
    word = "weigth_decay"
    try:
        subject.build([{"params": list(Example().parameters()), word: 0.1}])
    except Exception as error:
        expect(word in str(error), f"the group key '{word}' is refused, but not by name: {error}")
    else:
        raise CheckFailure(f"the group key '{word}' was accepted")


@check()
def impossible_values(subject: Subject) -> None:
    """A negative learning rate climbs, a beta above 1 explodes, a NaN spreads: better refused than found in a day."""
    accepted = []
    for option, value in impossible(subject):
        try:
            subject.build(Example(), **{option: value})
        except Exception:
            continue
        accepted.append(f"{option}={value}")
    expect(not accepted, "accepted: " + ", ".join(accepted))


def impossible(subject: Subject) -> Iterator[tuple[str, Any]]:
    """(option, value outside its range) for the options that every rule means the same by."""
    if subject.takes("lr"):
        yield from (("lr", -0.1), ("lr", math.nan))
    if subject.takes("eps") and isinstance(subject.signature["eps"].default, float):
        yield "eps", -1e-8
    betas = subject.signature["betas"].default if subject.takes("betas") else ()
    if isinstance(betas, tuple):
        for index in range(len(betas)):
            yield "betas", (*betas[:index], 1.5, *betas[index + 1 :])


@check()
def options_arrive(subject: Subject) -> None:
    """An option that is accepted and never used is a sweep over nothing."""
    other_values = {
        name: _other_values(usual) for name, usual in _values(subject).items() if name not in SAME_RULE | {"lr"}
    }
    if not any(other_values.values()):
        skip("takes no options that are numbers or switches")
    without_effect = [
        name for name, others in other_values.items() if others and not _has_effect(subject, name, others)
    ]
    expect(not without_effect, "changes nothing: " + ", ".join(without_effect))


def _values(subject: Subject) -> dict[str, Any]:
    """What the options are where nothing else is said."""
    return {name: option.default for name, option in subject.signature.items()} | dict(subject.options)


def _has_effect(subject: Subject, option: str, values: list[Any]) -> bool:
    """Whether one of ``values`` changes a training at all, alone or beside other options.

    A value that is refused counts as an effect: the option was read.
    """
    for base in _surroundings(subject, option):
        try:
            expected = _trained(subject, **base)
        except Exception:
            continue  # these do not go together
        for value in values:
            try:
                changed = _trained(subject, **base, **{option: value})
            except Exception:
                return True
            if any(not torch.equal(changed[name], expected[name]) for name in expected):
                return True
    return False


def _surroundings(subject: Subject, option: str) -> Iterator[dict[str, Any]]:
    """Other options in which an option may show: Nesterov needs momentum, decoupling a weight decay to decouple."""
    others = {name: value for name, value in _values(subject).items() if name not in SAME_RULE | {option}}
    strong = {name: value for name, value in {"weight_decay": 0.1, "momentum": 0.9}.items() if name in others}
    yield {}
    yield strong
    yield {"weight_decay": 0.0} if "weight_decay" in others else {}
    for name, usual in others.items():
        if isinstance(usual, bool):
            yield strong | {name: not usual}


def _other_values(usual: Any) -> list[Any]:
    """Values to try in the place of a number, a switch or numbers; none for anything else."""
    match usual:
        case bool():
            return [not usual]
        case int() | float():
            return [1.0] if math.isinf(usual) else [usual / 2 if usual else 0.1, usual * 4 + 0.01]
        case (float(), *_) if all(isinstance(number, float) for number in usual):
            return [tuple(number / 2 for number in usual)]
    return []


def _trained(subject: Subject, **options: Any) -> dict[str, Tensor]:
    """The weights after five steps with a learning rate and gradients that change, so that memory of them shows."""
    model = Example()
    optimizer = subject.build(model, **options)
    for step in range(5):
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * 0.7
        backward(model, step)
        optimizer.step()
    return weights(model)
