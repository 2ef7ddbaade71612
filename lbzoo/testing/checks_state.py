"""State: when it is created, what of it is saved, and that a resumed run is the run that was not interrupted."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lbzoo.testing.check import check, expect
from lbzoo.testing.example import Example, expect_close, expect_finite, expect_same, same, train, weights
from lbzoo.testing.subject import Subject


@check()
def state_exists_after_first_step(subject: Subject) -> None:
    """A distributed checkpoint is loaded into the state of a fresh optimizer after one step: a key that the optimizer
    creates later is not asked for, and silently lost.
    """
    model = Example()
    optimizer = subject.build(model)
    train(model, optimizer, range(1))
    first = state_layout(optimizer.state_dict())
    train(model, optimizer, range(1, 8))
    later = state_layout(optimizer.state_dict())
    for index in first | later:
        expect(
            first.get(index) == later.get(index),
            "the state changes its keys, shapes or types after the first step: "
            f"{first.get(index)} becomes {later.get(index)}",
        )


def state_layout(state_dict: dict[str, Any]) -> dict[int, dict[str, str]]:
    """What kind of value each key of each parameter's state holds."""

    def kind(value: Any) -> str:
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

    return {i: {key: kind(v) for key, v in state.items()} for i, state in state_dict["state"].items()}


@check()
def loading_step(subject: Subject) -> None:
    """torch.distributed.checkpoint and FSDP make the state of a fresh optimizer by a step with zero gradients and lr 0:
    it must raise nothing, leave the weights alone, and create all of the state.
    """
    model, trained = Example(), Example()
    before = weights(model)
    optimizer, stepped = subject.build(model), subject.build(trained)
    get_optimizer_state_dict(model, optimizer)
    expect_close(weights(model), before, before, "the weights after a step of lr 0")  # but for the rounding of x + 0
    train(trained, stepped, range(1))
    created, needed = (state_layout(o.state_dict()) for o in (optimizer, stepped))
    expect(created == needed, f"the step that loading makes creates {created.get(0)}, a real one {needed.get(0)}")


@check()
def state_dict_is_plain_data(subject: Subject) -> None:
    """torch.load reads tensors and plain data only, unless told to trust the file: a state with objects of the
    optimizer's own cannot be loaded where files come from elsewhere, nor after the class has changed.
    """
    model, other = Example(), Example()
    optimizer, fresh = subject.build(model), subject.build(other)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    saved, loaded = optimizer.state_dict(), fresh.state_dict()
    expect(state_layout(saved) == state_layout(loaded), "saving and loading changes the keys or types of the state")
    for index, state in saved["state"].items():
        for key, value in state.items():
            unchanged = not isinstance(value, torch.Tensor) or same(value, loaded["state"][index][key])
            expect(unchanged, f"saving and loading changes '{key}'")


@check()
def resume_equals_uninterrupted(subject: Subject) -> None:
    """What is kept outside of state and param_groups (an attribute, a counter) is gone after a restart: the curve jumps
    at every resume, and nobody knows why.
    """
    model, resumed = Example(), Example()
    optimizer = subject.build(model)
    train(model, optimizer, range(3))
    other_options = {"lr": 0.777} if subject.takes("lr") else {}  # the checkpoint's own learning rate must win
    continued = subject.build(resumed, **other_options)
    resumed.load_state_dict(model.state_dict())
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(resumed, continued, range(3, 6))
    expect_finite(resumed, "after a resume")
    expect_same(weights(resumed), weights(model), "resumed against not interrupted")
