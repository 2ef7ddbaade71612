"""Layer statistics, of the optimizers that publish them: ``track_layer_stats`` and ``layer_stats()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lbzoo.testing.check import check, expect, skip
from lbzoo.testing.example import Example, backward, expect_close, train, weights
from lbzoo.testing.subject import Subject

if TYPE_CHECKING:
    from lbzoo.optim import LayerStats


def tracked_step(optimizer: Any, model: Example, step: int) -> LayerStats:
    """The statistics of one step; the running check is skipped for optimizers that have none."""
    if not hasattr(optimizer, "layer_stats"):
        skip("publishes no layer statistics")
    optimizer.track_layer_stats = True
    backward(model, step)
    optimizer.step()
    optimizer.track_layer_stats = False
    stats: LayerStats = optimizer.layer_stats()
    return stats


@check()
def layer_stats_shape(subject: Subject) -> None:
    """Monitors plot one value a layer under the layer's name: a list that is longer, shorter or unnamed puts every
    curve under the name of another layer.
    """
    model = Example()
    optimizer = subject.build(model)
    names, values = (stats := tracked_step(optimizer, model, 0)).names, stats.values
    expect(len(names) == len(set(names)), "a layer is named twice")
    if "param_names" in optimizer.param_groups[0]:
        unknown = set(names) - {name for name, _ in model.named_parameters()}
        expect(not unknown, f"{sorted(unknown)} are no parameters of the model")
    expect(bool(values), "there are no values")
    for key, value in values.items():
        expect(isinstance(value, torch.Tensor), f"'{key}' is a {type(value).__name__}, not a tensor")
        expect(value.shape == (len(names),), f"'{key}' has shape {list(value.shape)} for {len(names)} layers")
        expect(bool(value.isfinite().all()), f"'{key}' is not finite")


@check()
def layer_stats_truth(subject: Subject) -> None:
    """A trust ratio or update ratio that is wrong sends people to tune what works."""
    model = Example()
    optimizer = subject.build(model)
    train(model, optimizer, range(2))
    before = weights(model)
    stats = tracked_step(optimizer, model, 2)
    if not set(stats.names) <= before.keys():
        skip("the optimizer was not given the parameters' names")
    after, same_gradients = weights(model), Example()
    backward(same_gradients, 2)
    for index, name in enumerate(stats.names):
        gradient = same_gradients.get_parameter(name).grad
        assert gradient is not None
        size, step = _norm(before[name]), _norm(after[name].double() - before[name].double())
        resolution = torch.finfo(torch.float32).eps * size / max(step, 1e-30)  # of a step seen as a difference
        truth = {"param_norm": size, "grad_norm": _norm(gradient), "update_ratio": step / size}
        for key in truth.keys() & stats.values.keys():
            value, expected = stats.values[key][index].item(), truth[key]
            near = abs(value - expected) <= (1e-3 + 2 * resolution) * expected
            expect(near, f"{key} of {name} is {value:.6g}, not {expected:.6g}")


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


@check()
def layer_stats_change_nothing(subject: Subject) -> None:
    """A run must not depend on which of its steps are logged."""
    model, unseen = Example(), Example()
    optimizer = subject.build(model)
    for step in range(4):
        tracked_step(optimizer, model, step)
    train(unseen, subject.build(unseen), range(4))
    expect_close(weights(model), weights(unseen), weights(Example()), "logged against not logged", tolerance=1e-5)
