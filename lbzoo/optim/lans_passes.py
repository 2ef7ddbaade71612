"""What LANS does over all elements: a pass that updates the moments and takes norms, and one that applies the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lbzoo.optim.adam_moments import adam_direction, gradient_direction
from lbzoo.optim.elementwise import Norms, add_scaled_, sweep

Temporaries: TypeAlias = Callable[[int], Sequence[Tensor]]


class Passes:
    """The two passes on lists of tensors, with the directions r and c (see ``lans``) in temporaries.

    ``steps``: the number of this step for each tensor, from 1. ``temporaries(slot)``: tensors like ``params``.
    ``grad_scales``: a factor on each gradient, None for none.
    """

    grad_scales: Sequence[Any] | None = None

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Any],
        temporaries: Temporaries,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.params, self.grads = params, grads
        self.moments, self.steps = (exp_avgs, exp_avg_sqs), steps
        self.options: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._temporaries = temporaries
        self._directions: tuple[Sequence[Tensor], ...] = ()

    def update_moments(self) -> Norms:
        """Update the moments; the norms [3, tensors] of this rank's parts of params, r and c."""
        self._directions = (self._temporaries(0), self._temporaries(1))
        columns = [self.params, self.grads, *self.moments, self.steps, *self._directions]
        if self.grad_scales is not None:
            columns.append(self.grad_scales)
        return sweep(partial(_set_directions, **self.options), columns, norms_of=[0, 5, 6])

    def add_step(self, targets: Sequence[Tensor], r_factors: Tensor, c_factors: Tensor) -> None:
        """targets += r_factors * r + c_factors * c, with a factor [tensors] for each."""
        r, c = self._directions
        add_scaled_(targets, (r, r_factors), (c, c_factors))


def _set_directions(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Any],
    average_updates: Sequence[Tensor],
    grad_updates: Sequence[Tensor],
    grad_scales: Sequence[Any] | None = None,
    **options: Any,
) -> None:
    """Update the moments and set both updates: r from the average, c from the gradient. An elementwise kernel."""
    if grad_scales is not None:
        grads = torch._foreach_mul(list(grads), list(grad_scales))
    adam_direction(params, grads, exp_avgs, exp_avg_sqs, steps, average_updates, **options)
    gradient_direction(params, grads, exp_avg_sqs, steps, grad_updates, **options)
