"""VRGD: any optimizer, on gradients whose elements are scaled by their signal-to-noise ratio.

Jiang et al., "Accelerating Large Batch Training via Gradient Signal to Noise Ratio (GSNR)" (arXiv 2309.13681),
algorithm 1 and section 4.2. From the k gradients of a step, with mean g and variance s2 element by element::

    r = g^2 / s2          at most ``gsnr_cap``
    r = r / mean(r)       over the tensor (eq. 8)
    r = clip(r, gamma, 1) (eq. 9)

The optimizer inside sees r g. One that keeps moments (it has ``betas``) sees p_hat g instead, with r averaged over the
steps: p = beta3 p + (1 - beta3) r, p_hat = p / (1 - beta3^t); that reading of the paper's missing appendix D has both
moments of p_hat g, and ``second_moment="raw"`` has the second one of g. ``beta3`` can be set for any optimizer.

What r multiplies is ``p.grad`` as the loop left it: unscaled, clipped. An element of which no gradient was seen (a row
of an embedding) has r = 1 and stays out of the mean. gamma = 1 is the optimizer inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from lbzoo.errors import UsageError
from lbzoo.optim.batch import Batch
from lbzoo.optim.elementwise import Norms, as_column, run
from lbzoo.optim.info import register_optimizer_wrapper
from lbzoo.optim.layerwise import has_overflowed
from lbzoo.optim.rules import Rule
from lbzoo.optim.state import new_average, new_step_count
from lbzoo.optim.wrapper import OptimizerWrapper
from lbzoo.sharding import local, local_gradient

FEW_GRADIENTS = 8  # the paper keeps k at least here (section 6)
# Optimizers whose second moment is an average of the squares of the gradient that they see, and of nothing else.
_ADAM_LIKE = ("Adam", "AdamW", "NAdam", "Lamb")


class Statistics(Protocol):
    """What is asked of :class:`lbzoo.GradientStats`."""

    def require(self, parameters: Sequence[Tensor]) -> int:
        """Complete the window, and return the number of gradients k."""

    def take_gsnr(self, parameter: Tensor) -> Tensor:
        """This rank's part of g^2 / s2, NaN where no gradient was seen; the caller's to keep."""

    def reset(self) -> None:
        """Begin another window."""

    @property
    def num_gradients(self) -> int: ...


@register_optimizer_wrapper("vr_", paper="arXiv 2309.13681", equation="algorithm 1", needs_gradient_stats=True)
class VarianceReduced(OptimizerWrapper):
    """VRGD: gradients scaled, element by element, by their signal-to-noise ratio.

    ``gamma``: the least factor. ``beta3``: of the average of the ratios over the steps; None is 0.9 where the optimizer
    inside has ``betas``, else 0, which keeps no average. ``gsnr_cap``, ``second_moment``: see the module.

    Call :meth:`attach_stats` before the first backward pass. A step uses the statistics and resets them; without any it
    raises UsageError, unless all gradients are zero, as they are when a checkpoint is loaded.
    """

    state_keys = ("gsnr_avg", "gsnr_steps")

    def __init__(
        self,
        base: Optimizer,
        *,
        gamma: float = 0.1,
        beta3: float | None = None,
        gsnr_cap: float | None = None,
        second_moment: Literal["adapted", "raw"] = "adapted",
    ) -> None:
        self.gradient_stats: Statistics | None = None
        self._has_stats = False  # in the current step
        self._with_grad: set[Tensor] = set()  # likewise
        self._k_of_checkpoint = False
        self._warned = False
        own = {"gamma": gamma, "beta3": beta3, "gsnr_cap": gsnr_cap, "second_moment": second_moment}
        super().__init__(base, {**own, "num_gradients": 0})
        for group in self.param_groups:
            _check_second_moment(base, group)

    def attach_stats(self, stats: Statistics) -> None:
        """Take the gradients' statistics from ``stats``, a :class:`lbzoo.GradientStats` of the model."""
        self.gradient_stats = stats

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # What the statistics tell is known to Python only: compiled, the step would silently go without its averages.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say its type
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. ``closure``, run first and with gradients enabled, computes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if has_overflowed(self):
            return loss
        self._has_stats = self._prepare()
        super().step()
        if self._has_stats:
            assert self.gradient_stats is not None
            self.gradient_stats.reset()
        self._has_stats = False
        self._with_grad.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and what is known of them: a step that a GradScaler skipped leaves no trace."""
        super().zero_grad(set_to_none)
        if self.gradient_stats is not None:
            self.gradient_stats.reset()

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if _beta3(group) == 0:
            return {}
        return {"gsnr_avg": new_average(param), "gsnr_steps": new_step_count()}

    def rule(self, batch: Batch) -> Rule:
        if not self._has_stats:
            return {}
        ratios = [self._ratios_of(owner, grad) for owner, grad in zip(batch.owners, batch.grads, strict=True)]
        cap = batch.group["gsnr_cap"]
        if cap is not None:
            torch._foreach_clamp_max_(ratios, cap)
        sums, counts = yield Norms(torch.stack([_sum_and_count(each) for each in ratios], dim=1), order=1.0)
        means = sums / counts
        gamma = batch.group["gamma"]
        run(lambda r, mean: _normalise_(r, mean, gamma), [ratios, as_column(means.to(ratios[0].dtype), ratios)])
        beta3 = _beta3(batch.group)
        if beta3:
            counts_of_steps = batch.state("gsnr_steps")
            torch._foreach_add_(counts_of_steps, 1.0)
            weights = [(1 - beta3) / (1 - beta3 ** count.item()) for count in counts_of_steps]
            run(_average_, [ratios, batch.state("gsnr_avg"), weights])
        run(torch._foreach_mul_, [ratios, batch.grads])
        batch.grads = ratios
        return {"gsnr": means}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the state of both. The first step then compares k with that of the run that was saved."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "gsnr_steps" in state:
                state["gsnr_steps"] = state["gsnr_steps"].cpu()  # to be read without waiting for a device
        self._k_of_checkpoint = True

    def _prepare(self) -> bool:
        """Whether there are statistics for this step."""
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        stats = self.gradient_stats
        if (stats is None or stats.num_gradients < 2) and all(_is_zero(param) for param in with_grad):
            return False
        if stats is None:
            raise UsageError(
                "this optimizer needs the statistics of the gradients: stats = lbzoo.GradientStats(model), made of the "
                "model as it is trained, and optimizer.attach_stats(stats), before the first backward pass"
            )
        self._check_k(stats.require(with_grad))
        self._with_grad.update(with_grad)
        return True

    def _check_k(self, k: int) -> None:
        saved = self.param_groups[0]["num_gradients"] if self.param_groups else 0
        if saved == 0 or self._k_of_checkpoint:
            for group in self.param_groups:
                group["num_gradients"] = k
            if saved not in (0, k):
                warnings.warn(
                    f"this run was saved with k = {saved} gradients a step and goes on with k = {k}: their ratios have "
                    f"another distribution; GradientStats(model, groups={saved}) keeps k",
                    UserWarning,
                    stacklevel=1,
                )
        self._k_of_checkpoint = False
        if k < FEW_GRADIENTS and not self._warned:
            self._warned = True
            warnings.warn(
                f"k = {k} gradients a step tell little of their variance: the paper keeps k >= {FEW_GRADIENTS} (more "
                "ranks, more accumulated micro-batches)",
                UserWarning,
                stacklevel=1,
            )

    def _ratios_of(self, owner: Tensor, grad: Tensor) -> Tensor:
        assert self.gradient_stats is not None
        if owner not in self._with_grad:
            return torch.full_like(grad, float("nan"))  # a stand-in for gradients that only other ranks have
        return self.gradient_stats.take_gsnr(owner)

    def _step_base(self, batches: Sequence[Batch]) -> None:
        raw = [batch for batch in batches if batch.group["second_moment"] == "raw"]
        if self._has_stats and raw:
            owners = [owner for batch in raw for owner in batch.owners if owner in self._with_grad]
            self._create_moments([owner for owner in owners if "exp_avg_sq" not in self.state.get(owner, {})])
            for batch in raw:
                self._keep_second_moments_raw(batch)
        super()._step_base(batches)

    def _keep_second_moments_raw(self, batch: Batch) -> None:
        """Add to v what its coming average, b2 v + (1 - b2) (p_hat g)^2, will lack of that of g^2."""
        beta2 = batch.group["betas"][1]
        for owner, adapted in zip(batch.owners, batch.grads, strict=True):
            if owner in self._with_grad:
                second_moment = local(self.state[owner]["exp_avg_sq"])
                lacking = local_gradient(owner).to(adapted.dtype).square().addcmul_(adapted, adapted, value=-1)
                second_moment.add_(lacking, alpha=(1 - beta2) / beta2)

    def _create_moments(self, params: Sequence[Tensor]) -> None:
        """Have the base make its state, by a step of no length on zero gradients."""
        groups = self.base.param_groups
        kept = [(param, param.grad) for group in groups for param in group["params"]]
        options = [(group["lr"], group["weight_decay"]) for group in groups]
        try:
            for param, _ in kept:
                param.grad = None
            for param in params:
                param.grad = torch.zeros_like(param)
            for group in groups:
                group["lr"], group["weight_decay"] = group["lr"] * 0.0, 0.0
            self.base.step()
        finally:
            for param, grad in kept:
                param.grad = grad
            for group, (lr, weight_decay) in zip(groups, options, strict=True):
                group["lr"], group["weight_decay"] = lr, weight_decay
        for param in params:
            self.state[param]["step"].zero_()
            if "mu_product" in self.state[param]:  # NAdam's
                self.state[param]["mu_product"].fill_(1.0)


def _beta3(group: dict[str, Any]) -> float:
    beta3: float | None = group["beta3"]
    return beta3 if beta3 is not None else 0.9 if "betas" in group else 0.0


def _check_second_moment(base: Optimizer, group: dict[str, Any]) -> None:
    if group["second_moment"] == "adapted":
        return
    if type(base).__name__ not in _ADAM_LIKE or group.get("nesterov") == "both":
        raise UsageError("second_moment='raw' works around adam, adamw, nadam, lamb and nlamb only")
    if group["betas"][1] == 0:
        raise UsageError("second_moment='raw' needs betas[1] above 0: without an average there is nothing to keep")


def _sum_and_count(ratios: Tensor) -> Tensor:
    """[2] in double: the sum and the number of the ratios that are defined."""
    pieces = ratios.reshape(-1).split(1 << 20) if ratios.device.type == "cpu" else [ratios]
    sums = [torch.stack([piece.nansum(), (piece == piece).sum()]).double() for piece in pieces]
    return torch.stack(sums).sum(0)


def _normalise_(ratios: list[Tensor], means: list[Any], gamma: float) -> None:
    torch._foreach_div_(ratios, means)
    torch._foreach_clamp_min_(ratios, gamma)
    torch._foreach_clamp_max_(ratios, 1.0)
    for each in ratios:
        each.nan_to_num_(nan=1.0)


def _average_(ratios: list[Tensor], averages: list[Tensor], weights: list[float]) -> None:
    """Move the averages towards the ratios, then put them in their place.

    With weight (1 - beta3) / (1 - beta3^t) they are p / (1 - beta3^t) themselves, and exactly 1 where all ratios were.
    """
    torch._foreach_lerp_(averages, ratios, weights)
    torch._foreach_copy_(ratios, averages)


def _is_zero(param: Tensor) -> bool:
    """Whether the gradient is. One without values, on the meta device, counts as zero."""
    assert param.grad is not None
    grad = local(param.grad)
    return grad.is_meta or not bool(grad.any())
