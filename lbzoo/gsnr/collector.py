"""GradientStats: mean, variance and signal-to-noise ratio of the gradients that make up a step.

    stats = lbzoo.GradientStats(model)               # as it is trained: after DDP(...) or fully_shard(...)
    for micro_batch in micro_batches:
        (loss_fn(model, micro_batch) / len(micro_batches)).backward()
    stats.gsnr(), stats.mean_gsnr_per_layer(), stats.noise_scale()
    optimizer.step(); optimizer.zero_grad()

Every backward pass of every rank is one of the k gradients of a step, k = ranks x micro-batches. They are spoken of in
the units of ``p.grad``, which is their mean: where the loop divides the loss by the number of micro-batches, gradient j
is that of micro-batch j; where it adds up, everything is that much larger. The variance divides by k (VRGD, eq. 7).

A step's window begins where ``p.grad`` is None (``zero_grad()``) or after :meth:`GradientStats.reset`. Statistics may
be read before or after the gradients were unscaled or clipped by their norm; they belong to ``p.grad`` as it is.
Clipping by value is not a multiplication: read before it.

One float32 is kept a parameter element, under FSDP2 sharded as the parameter is; with ``groups`` another one, which
FSDP2 does not shard.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbzoo.errors import UsageError
from lbzoo.gsnr.fsdp import FSDPBackend
from lbzoo.gsnr.layout import Backend, backend_for, named_parameters, pool_size
from lbzoo.gsnr.noise import NoiseAverages
from lbzoo.gsnr.sums import GradientSums, gsnr_, norm_of, variance
from lbzoo.gsnr.unseen import refuse_unseen
from lbzoo.sharding import ShardGroups, local_gradient, reduce_over_shards, shard_groups, with_local


class GradientStats:
    """Statistics of the k gradients of a step, for a plain model, DistributedDataParallel, FSDP2 or HSDP.

    Args:
        model: as it is trained, after it was wrapped.
        groups: k, however the batch is cut: consecutive micro-batches of a rank are pooled into that many gradients. A
            multiple of the number of ranks.
        micro_batch_size: samples of one backward pass on one rank; ``noise_scale`` needs it. Where FSDP2 does not
            reduce after each (``set_requires_gradient_sync``): of all that it reduces at once.
        micro_batches: backward passes of one rank in a step. Needed with ``groups`` where there are more than
            groups / ranks; checked where it is given.
        noise_decay: of the averages of the noise scale, from one observed step to the next.

    Raises UsageError for a bare model in a process group of several ranks, FSDP1, a model that has a GradientStats
    already, numbers that do not divide, and where no gradient can be seen.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: int | None = None,
        micro_batch_size: int | None = None,
        *,
        micro_batches: int | None = None,
        noise_decay: float = 0.99,
    ) -> None:
        _check_at_least_one(groups=groups, micro_batch_size=micro_batch_size, micro_batches=micro_batches)
        if not 0 <= noise_decay < 1:
            raise UsageError(f"GradientStats: noise_decay must be at least 0 and below 1, got {noise_decay}")
        if attached_stats(model) is not None:
            raise UsageError("GradientStats: this model has one already; share it, or detach() it first")
        parameters = {name: p for name, p in named_parameters(model) if p.requires_grad}
        left_out = refuse_unseen(model, parameters)
        self._sums = {name: GradientSums(name, p) for name, p in parameters.items() if name not in left_out}
        self._of_parameter = {sums.parameter: sums for sums in self._sums.values()}
        self.groups, self.micro_batch_size, self.micro_batches = groups, micro_batch_size, micro_batches
        make_backend, ranks = backend_for(model, list(self._sums.values()))
        self._backend: Backend = make_backend(pool_size(groups, micro_batches, ranks))
        self._noise = NoiseAverages(noise_decay)
        self._finished_at = self._noise_observed_at = -1  # values of _version()
        self._passes_to_take = 0
        self._model = weakref.ref(model)
        _attached[model] = self

    @property
    def num_gradients(self) -> int:
        """k: the gradients in the window so far, over all ranks."""
        return self._backend.ranks * max((sums.gradients for sums in self._live()), default=0)

    @property
    def samples(self) -> int:
        """The samples in the window, over all ranks. Raises UsageError without ``micro_batch_size``."""
        if self.micro_batch_size is None:
            raise UsageError("GradientStats: to count in samples, give it micro_batch_size: samples of a backward pass")
        return self.micro_batch_size * self._backend.ranks * self._passes()

    def mean(self) -> dict[str, Tensor]:
        """The mean of the k gradients by parameter: ``p.grad``."""
        return self._by_name(lambda sums, _: _local(sums).detach().clone())

    def variance(self) -> dict[str, Tensor]:
        """The variance over the k gradients (divided by k) of every element, by parameter; sharded as it is."""
        return self._by_name(lambda sums, passes: variance(_squares(sums), _local(sums), passes, sums.factor()))

    def gsnr(self) -> dict[str, Tensor]:
        """mean^2 / variance of every element, by parameter; sharded as it is.

        At most 1 / (8 eps) of the gradient's type, 1e6 in float32; NaN where all k gradients are 0.
        """
        return self._by_name(lambda sums, passes: _gsnr(sums, passes, _squares(sums).clone()))

    def mean_gsnr_per_layer(self) -> dict[str, Tensor]:
        """The mean GSNR of each parameter tensor, 0-dim, over the elements that have one. One all_reduce if sharded."""
        return self._mean_over_elements(lambda gsnr, _: gsnr)

    def share_at(self, gamma: float) -> dict[str, Tensor]:
        """By parameter: the share of elements whose GSNR is at most ``gamma`` times the mean, 0-dim."""
        means = self.mean_gsnr_per_layer()
        return self._mean_over_elements(lambda gsnr, name: gsnr <= gamma * means[name])

    def observe_noise(self) -> None:
        """Add the window to the averages of the noise scale, once. Nothing is read back from the device."""
        layers, gradients = self._complete(), self.num_gradients
        if self._noise_observed_at == self._version():
            return
        squared_means, variances = self._energies(layers)
        self._noise.add([sums.name for sums in layers], squared_means, variances, self.samples, gradients)
        self._noise_observed_at = self._version()

    def noise_scale(self) -> float:
        """The gradient noise scale of the whole model in samples, over all observed steps (:mod:`lbzoo.gsnr.noise`).

        Observes the window, if it is complete; so call it once a step, between the last backward pass and ``step()``.
        Infinite where no signal can be told from the noise, NaN where no gradient was ever other than zero. Steps with
        gradients that are not finite are left out.
        """
        self._observe_if_any()
        return self._noise.whole()

    def noise_scale_per_layer(self) -> dict[str, float]:
        """As ``noise_scale``, for each parameter tensor by itself."""
        self._observe_if_any()
        return self._noise.per_layer()

    def noise_state(self) -> dict[str, Any]:
        """The averages of the noise scale: plain values and tensors, for a checkpoint."""
        return self._noise.state()

    def load_noise_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the averages of an earlier object."""
        self._noise.load_state(state, next(iter(self._of_parameter)).device)

    def generalization_ratio(self) -> float:
        """The one-step generalisation ratio: what a small step of SGD gains on new data, over its gain on this batch.

        1 - sum_j W_j / (k r_j + 1) over the elements (Liu et al. 2020; VRGD, section 3), which with unbiased estimates
        is |G|^2 / |mean|^2. An estimate, that may fall below 0.
        """
        squared_means, variances = self._energies(self._complete())
        return float(1 - variances.sum() / ((self.num_gradients - 1) * squared_means.sum()))

    def parameter(self, name: str) -> Tensor:
        """The parameter that the other methods call ``name``."""
        return self._sums[name].parameter

    def take_gsnr(self, parameter: Tensor) -> Tensor:
        """This rank's part of the parameter's GSNR, made in the memory of the sums, which are gone then.

        For optimizers, after :meth:`require`: they may write to what they get, and call :meth:`reset` in the end.
        """
        sums = self._of_parameter[parameter]
        values = _gsnr(sums, self._passes_to_take, _squares(sums))
        sums.squares = None
        return values

    def require(self, parameters: Sequence[Tensor]) -> int:
        """Complete the window and return k. Raises UsageError if it is below 2, and for parameters not watched."""
        self._complete()
        unknown = [parameter for parameter in parameters if parameter not in self._of_parameter]
        if unknown:
            shapes = ", ".join(str(list(parameter.shape)) for parameter in unknown[:3])
            raise UsageError(
                f"GradientStats does not see {len(unknown)} parameters of the optimizer (of shapes {shapes}): "
                "make it of the model that the optimizer trains, after both were wrapped"
            )
        self._passes_to_take = self._passes()
        return self.num_gradients

    def pause(self) -> None:
        """Collect nothing, and communicate nothing more than without this object, until :meth:`resume`."""
        self.reset()
        self._backend.switch.is_on = False

    def resume(self) -> None:
        """Collect from the next backward pass on, which begins a window. On all ranks between the same two steps."""
        self.reset()
        self._backend.switch.is_on = True

    @property
    def is_collecting(self) -> bool:
        """Not between :meth:`pause` and :meth:`resume`, nor after :meth:`detach`."""
        return self.is_attached and self._backend.switch.is_on

    def reset(self) -> None:
        """Forget the window; the next backward pass begins another. The averages of the noise scale stay."""
        for sums in self._sums.values():
            sums.restart()
        self._finished_at = -1

    def detach(self) -> None:
        """Take all hooks off the model. What was observed of the noise can still be read."""
        self.reset()
        self._backend.detach()
        model = self._model()
        if model is not None and self.is_attached:
            del _attached[model]

    @property
    def is_attached(self) -> bool:
        """Until :meth:`detach`."""
        model = self._model()
        return model is not None and attached_stats(model) is self

    def _live(self) -> Iterator[GradientSums]:
        return (sums for sums in self._sums.values() if sums.is_live)

    def _passes(self) -> int:
        """n: backward passes of one rank in the window."""
        return max((sums.count for sums in self._live()), default=0)

    def _version(self) -> int:
        """Counts the backward passes since this object was made."""
        return max(sums.arrivals for sums in self._sums.values())

    def _complete(self) -> list[GradientSums]:
        """The parameters that have gradients, their sums over all ranks."""
        if self._finished_at != self._version():
            self._backend.finish(list(self._sums.values()))
            self._finished_at = self._version()
        layers = list(self._live())
        self._check_window(self._passes())
        return layers

    def _check_window(self, passes: int) -> None:
        gradients = self.num_gradients
        if passes == 0:
            raise UsageError(
                "GradientStats has seen no gradients since the last step: it must be made before the backward passes, "
                "and under no_sync() the last of them must synchronise"
            )
        if gradients < 2:
            raise UsageError(
                f"GradientStats has seen {gradients} gradient in this step, and a variance needs two (better eight): "
                "accumulate micro-batches (accumulate_grad_batches, a smaller micro_batch_size), or use more ranks"
            )
        if self.groups is not None and gradients != self.groups:
            self._check_groups(gradients, passes)

    def _check_groups(self, gradients: int, passes: int) -> None:
        """Fewer gradients than groups are right in one case: the loop has cut the last window of an epoch short."""
        expected = self.micro_batches or passes
        whole_pools = passes % pool_size(self.groups, self.micro_batches, self._backend.ranks) == 0
        if passes < expected and (whole_pools or not isinstance(self._backend, FSDPBackend)):
            return
        if self.micro_batches is None:
            advice = f"say how many a rank makes in a step, as in micro_batches={passes}"
        else:
            advice = f"a step has micro_batches={self.micro_batches}: synchronise in the last, zero_grad() after it"
        raise UsageError(
            f"GradientStats has seen {gradients} gradients in {passes} backward passes a rank, "
            f"not groups={self.groups}; {advice}"
        )

    def _by_name(self, compute: Callable[[GradientSums, int], Tensor]) -> dict[str, Tensor]:
        layers, passes = self._complete(), self._passes()
        return {sums.name: with_local(sums.parameter, compute(sums, passes)) for sums in layers}

    def _mean_over_elements(self, measure: Callable[[Tensor, str], Tensor]) -> dict[str, Tensor]:
        """By parameter: the mean of ``measure(gsnr, name)`` over the elements that have a GSNR."""
        layers, passes = self._complete(), self._passes()
        rows = []
        for sums in layers:
            gsnr = _gsnr(sums, passes, _squares(sums).clone())
            rows.append(torch.stack([measure(gsnr, sums.name).nansum(), gsnr.isfinite().sum()]))
        totals, counts = self._over_shards(layers, rows)
        return dict(zip([sums.name for sums in layers], (totals / counts).float().unbind(), strict=True))

    def _energies(self, layers: Sequence[GradientSums]) -> tuple[Tensor, Tensor]:
        """(|mean|^2, the variances summed) of each layer, [layers] each, in double."""
        passes = self._passes()
        rows = []
        for sums in layers:
            squared_mean = norm_of(_local(sums)).double().square()
            total = _squares(sums).sum().double() * (passes * sums.factor().double().square())
            rows.append(torch.stack([squared_mean, total]))
        squared_means, totals = self._over_shards(layers, rows)
        return squared_means, (totals - squared_means).clamp(min=0)

    def _over_shards(self, layers: Sequence[GradientSums], rows: Sequence[Tensor]) -> Tensor:
        """[rows, layers]: numbers of this rank's parts added up over the ranks that hold the rest."""
        table = torch.stack([row.double().to(rows[0].device) for row in rows], dim=1)
        columns: dict[ShardGroups, list[int]] = {}
        for column, sums in enumerate(layers):
            columns.setdefault(shard_groups(sums.parameter), []).append(column)
        for shards, own in columns.items():
            table[:, own] = reduce_over_shards(table[:, own], shards)
        return table

    def _observe_if_any(self) -> None:
        if self._passes():
            self.observe_noise()
        elif not self._noise.steps:
            self._check_window(0)


# No GradientStats holds its model, or neither would ever be collected.
_attached: weakref.WeakKeyDictionary[nn.Module, GradientStats] = weakref.WeakKeyDictionary()


def attached_stats(model: nn.Module) -> GradientStats | None:
    """The GradientStats that was made of ``model`` and not detached."""
    return _attached.get(model)


def _check_at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"GradientStats: {name} must be at least 1, got {value}")


def _local(sums: GradientSums) -> Tensor:
    """This rank's part of ``p.grad``."""
    return local_gradient(sums.parameter)


def _squares(sums: GradientSums) -> Tensor:
    assert sums.squares is not None
    return sums.squares


def _gsnr(sums: GradientSums, passes: int, squares: Tensor) -> Tensor:
    return gsnr_(squares, _local(sums), passes, sums.factor())
