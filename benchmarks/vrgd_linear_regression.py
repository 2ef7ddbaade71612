"""VRGD's linear regression (sections 7.2 and 7.3, figure 3): VR-SGD against SGD, each at its best learning rate.

    python benchmarks/vrgd_linear_regression.py              # tables on the screen, plots in docs/images
    python benchmarks/vrgd_linear_regression.py --no-plots

y = 1 x_1 + ... + 10 x_10 + noise; weights from 0; 100 steps of 2048 new samples. The paper states neither the inputs'
distribution nor the noise, the learning rates or k, so both distributions and three amounts of noise are tried, and for
each optimizer a grid of learning rates. All runs of a setting go side by side in numpy, in double precision; the first
thing that the script does is to train with lbzoo's own vr_sgd and compare.

The loss is that of the population, less the noise that no weights can predict ("excess"). Medians over the seeds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import lbzoo
from lbzoo.data.linear_regression import draw
from lbzoo.data.rng import stable_rng

Array = NDArray[np.float64]

DIM, BATCH, STEPS = 10, 2048, 100
TRUE = np.arange(1.0, DIM + 1)
RATES = np.geomspace(0.01, 1.0, 49)  # 10 % apart
KINDS = [(inputs, noise) for inputs in ("normal", "uniform") for noise in (0.0, 1.0, 10.0)]
GRIDS: dict[str, list[float]] = {
    "gamma": [0.01, 0.02, 0.04, 0.1, 0.2, 0.5, 1.0],
    "k": [2, 4, 8, 16, 32, 64, 128, 256, 512],
}
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


@dataclass(frozen=True)
class Setting:
    """``k`` gradients a step; ``gamma`` 1 is SGD."""

    inputs: str = "normal"
    noise: float = 1.0
    k: int = 64
    gamma: float = 0.1
    seeds: int = 16


@dataclass(frozen=True)
class Runs:
    """Of every learning rate and seed. ``excess`` [rates, seeds, steps + 1], before each step and after the last;
    ``errors`` and ``gsnr`` [rates, seeds, steps, weights], before each step."""

    rates: Array
    excess: Array
    errors: Array
    gsnr: Array

    def best(self) -> int:
        """The index of the rate with the lowest median excess at the end."""
        return int(np.nanargmin(np.median(self.excess[:, :, -1], axis=1)))

    def settles(self, rate: int) -> bool:
        """Whether the excess at the end is below that of the start."""
        return self.final(rate) < float(self.excess[rate, 0, 0])

    def fastest_to(self, excess: float) -> float:
        """The least ``steps_to`` of all learning rates."""
        return min(self.steps_to(excess, rate) for rate in range(len(self.rates)))

    def final(self, rate: int) -> float:
        return float(np.median(self.excess[rate, :, -1]))

    def steps_to(self, excess: float, rate: int) -> float:
        """The median step after which the excess is first at most ``excess``; infinite where it never is."""
        below = self.excess[rate] <= excess
        first = np.where(below.any(axis=1), below.argmax(axis=1), np.inf)
        return float(np.median(first))


def train(setting: Setting, rates: Array = RATES) -> Runs:
    """All learning rates and seeds at once: the gradient of each part is 2 (A_j w - c_j)."""
    weights = np.zeros((len(rates), setting.seeds, DIM))
    covariance = np.eye(DIM) if setting.inputs == "normal" else np.eye(DIM) / 12 + 0.25
    excess, errors, ratios = [], [], []
    for step in range(STEPS + 1):
        error = weights - TRUE
        excess.append(np.einsum("lsd,de,lse->ls", error, covariance, error))
        if step == STEPS:
            break
        a_skde, c_skd = _normal_equations(setting, step)
        g_lskd = 2 * (np.einsum("skde,lse->lskd", a_skde, weights, optimize=True) - c_skd)
        mean = g_lskd.mean(axis=2)
        variance = np.maximum((g_lskd**2).mean(axis=2) - mean**2, 1e-6 * mean**2)
        ratio = mean**2 / variance
        scale = np.clip(ratio / ratio.mean(axis=-1, keepdims=True), setting.gamma, 1.0)
        errors.append(error)
        ratios.append(ratio)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = weights - rates[:, None, None] * scale * mean
    return Runs(rates, np.stack(excess, axis=-1), np.stack(errors, axis=2), np.stack(ratios, axis=2))


def batch(setting: Setting, seed: int, step: int) -> tuple[Array, Array]:
    return draw(BATCH, DIM, setting.inputs, setting.noise, stable_rng(seed, step))  # type: ignore[arg-type]


def _normal_equations(setting: Setting, step: int) -> tuple[Array, Array]:
    """(A [seeds, k, d, d], c [seeds, k, d]): the means of x x' and x y in each of the k parts of the batch."""
    each = [batch(setting, seed, step) for seed in range(setting.seeds)]
    x = np.stack([x for x, _ in each]).reshape(setting.seeds, setting.k, -1, DIM)
    y = np.stack([y for _, y in each]).reshape(setting.seeds, setting.k, -1)
    part = x.shape[2]
    return np.einsum("skbd,skbe->skde", x, x, optimize=True) / part, np.einsum("skbd,skb->skd", x, y) / part


def check(setting: Setting, rate: float, steps: int = 10) -> float:
    """The largest difference between the weights of lbzoo's vr_sgd and of :func:`train` after some steps."""
    warnings.simplefilter("ignore")
    model = torch.nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    optimizer = lbzoo.create_optimizer(model, "vr_sgd", lr=rate, gamma=setting.gamma)
    optimizer.attach_stats(lbzoo.GradientStats(model))  # type: ignore[attr-defined]  # of the VR optimizers
    for step in range(steps):
        x, y = (torch.from_numpy(part) for part in batch(setting, 0, step))
        for x_part, y_part in zip(x.chunk(setting.k), y.chunk(setting.k), strict=True):
            (torch.nn.functional.mse_loss(model(x_part).squeeze(1), y_part) / setting.k).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = train(replace(setting, seeds=1), np.array([rate])).errors[0, 0, steps] + TRUE
    return float(np.abs(model.weight.detach().numpy()[0] - expected).max())


def compare() -> None:
    """SGD and VR-SGD at the learning rates of a grid, for every kind of input and noise."""
    print("Excess loss after 100 steps, each at its best learning rate; steps until SGD's is reached:\n")
    print("| inputs | noise | SGD: rate | excess | VR-SGD: rate | excess | steps | at any rate | SGD at any rate |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for inputs, noise in KINDS:
        setting = Setting(inputs, noise)
        sgd, vr = train(replace(setting, gamma=1.0)), train(setting)
        i, j = sgd.best(), vr.best()
        target = sgd.final(i)
        cells = [f"{RATES[i]:.3f}", f"{target:.1e}", f"{RATES[j]:.3f}", f"{vr.final(j):.1e}"]
        cells += [_steps(vr.steps_to(target, j)), _steps(vr.fastest_to(target)), _steps(sgd.fastest_to(target))]
        print(f"| {inputs} | {noise:g} | " + " | ".join(cells) + " |")
    print("\nAt equal learning rates, the step in which VR-SGD reaches SGD's loss after 100 steps:\n")
    rates = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4])
    print("| inputs | noise | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---|---:|" + "---:|" * len(rates))
    for inputs, noise in KINDS:
        setting = Setting(inputs, noise)
        sgd, vr = train(replace(setting, gamma=1.0), rates), train(setting, rates)
        cells = [_steps(vr.steps_to(sgd.final(i), i)) if sgd.settles(i) else "SGD diverges" for i in range(len(rates))]
        print(f"| {inputs} | {noise:g} | " + " | ".join(cells) + " |")


def sensitivity(setting: Setting) -> dict[str, tuple[list[float], list[float]]]:
    """{option: (values, excess at the end)} for gammas and for ks, each at its best learning rate."""
    sgd = train(replace(setting, gamma=1.0))
    target = sgd.final(sgd.best())
    results = {}
    for name, values in GRIDS.items():
        ends = []
        print(f"\n{setting.inputs} inputs, noise {setting.noise:g}:\n")
        print(f"| {name} | best rate | excess at 100 | steps to SGD's, at any rate |\n|---:|---:|---:|---:|")
        for value in values:
            runs = train(replace(setting, **{name: value}))  # type: ignore[arg-type]  # by the name of a field
            best = runs.best()
            ends.append(runs.final(best))
            print(f"| {value:g} | {RATES[best]:.3f} | {ends[-1]:.2e} | {_steps(runs.fastest_to(target))} |")
        results[name] = (values, ends)
    return results


def _steps(count: float) -> str:
    return "never" if np.isinf(count) else f"{count:.0f}"


def order(setting: Setting, rate: float) -> None:
    """When each weight is within 5 % of its value."""
    print(f"\n{setting.inputs} inputs, noise {setting.noise:g}, rate {rate:g}: steps until a weight is within 5 %\n")
    print("| | " + " | ".join(f"w{i}" for i in range(1, DIM + 1)) + " |\n|---|" + "---:|" * DIM)
    for label, gamma in (("SGD", 1.0), ("VR-SGD", setting.gamma)):
        runs = train(replace(setting, gamma=gamma), np.array([rate]))
        near = np.abs(runs.errors[0]) <= 0.05 * TRUE
        first = np.median(np.where(near.any(axis=1), near.argmax(axis=1), np.inf), axis=0)
        print(f"| {label} | " + " | ".join(_steps(each) for each in first) + " |")


def plot_curves(settings: Sequence[tuple[Setting, float]], path: Path) -> None:
    """Excess loss, and the GSNR of every weight, over the steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(settings), 3, figsize=(13, 3.6 * len(settings)), layout="constrained")
    for row, (setting, rate) in zip(np.atleast_2d(axes), settings, strict=True):
        for gamma, label in ((1.0, "SGD"), (setting.gamma, "VR-SGD")):
            runs = train(replace(setting, gamma=gamma), np.array([rate]))
            row[0].semilogy(np.median(runs.excess[0], axis=0), label=label)
            column = row[1 if gamma == 1.0 else 2]
            column.semilogy(np.median(runs.gsnr[0], axis=0), label=[f"w{i}" for i in range(1, DIM + 1)])
            column.set_prop_cycle(None)
            column.set(title=f"GSNR of each weight, {label}", xlabel="step")
        row[2].legend(ncols=2, fontsize="small")
        row[0].legend()
        title = f"{setting.inputs} inputs, noise {setting.noise:g}, learning rate {rate:g}"
        row[0].set(title=title, xlabel="step", ylabel="excess loss")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_sensitivity(results: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, (name, (values, ends)) in zip(axes, results.items(), strict=True):
        axis.loglog(values, ends, "o-")
        axis.set(xlabel=name, title=f"each {name} at its best learning rate")
    axes[0].set(ylabel="excess loss after 100 steps")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-plots", action="store_true")
    arguments = parser.parse_args()
    setting = Setting()
    print(f"lbzoo's vr_sgd against this script, weights after 10 steps: {check(setting, 0.2):.1e} apart\n")
    compare()
    results = sensitivity(Setting("uniform", 10.0))
    order(Setting("normal", 1.0), 0.05)
    order(Setting("uniform", 1.0), 0.3)
    if not arguments.no_plots:
        IMAGES.mkdir(exist_ok=True)
        pairs = [(Setting("normal", 1.0), 0.045), (Setting("uniform", 10.0), 0.2)]
        plot_curves(pairs, IMAGES / "vrgd_linear_regression.png")
        plot_sensitivity(results, IMAGES / "vrgd_linear_regression_sensitivity.png")


if __name__ == "__main__":
    main()
