"""Gradients of parameters that this rank holds whole: seen by hooks on the parameters, before they are added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lbzoo.errors import UsageError
from lbzoo.gsnr.sums import GradientSums


class Switch:
    """Whether gradients are collected. All ranks turn it between the same two steps."""

    is_on = True


def watch(sums: GradientSums, pool_size: int, switch: Switch) -> RemovableHandle:
    """Have ``sums`` take every gradient of its parameter. The hook also fires where synchronisation is off."""

    def take(gradient: Tensor) -> None:
        if not switch.is_on:
            return
        if gradient.is_sparse:
            raise UsageError(f"GradientStats: {sums.name} has a sparse gradient: give its embedding sparse=False")
        sums.add(gradient, pool_size)

    handle: RemovableHandle = sums.parameter.register_hook(take)
    return handle


def watch_sum(sums: GradientSums, switch: Switch) -> RemovableHandle:
    """Have ``sums`` look at ``p.grad`` each time that a gradient was added to it."""

    def seal(_: Tensor) -> None:
        if switch.is_on:
            sums.seal()

    handle: RemovableHandle = sums.parameter.register_post_accumulate_grad_hook(seal)
    return handle


class LocalBackend:
    """A model on one device. Nothing is communicated."""

    ranks = 1

    def __init__(self, all_sums: Sequence[GradientSums], pool_size: int) -> None:
        self.switch = Switch()
        self._handles = [watch(sums, pool_size, self.switch) for sums in all_sums]
        self._handles += [watch_sum(sums, self.switch) for sums in all_sums]

    def finish(self, all_sums: Iterable[GradientSums]) -> None:
        """Complete the sums, before they are read."""
        for sums in all_sums:
            sums.close_pool()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
