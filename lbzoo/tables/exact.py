"""What the papers' numbers say that needs no training: computed by the zoo's own schedules, scaling and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lbzoo import scaling
from lbzoo.papers import find_rows, load_paper
from lbzoo.schedules import build_schedule

_BERT_SEQUENCES = 512_000_000  # that every BERT run of LAMB table 1 sees
_LAMB_BASE = 512  # the batch size that LAMB's untuned settings start from
_IMAGENET_TRAIN = 1_281_167


@dataclass(frozen=True)
class ExactCheck:
    """A number that a paper prints and the one that our code comes to."""

    id: str
    """The table, figure or algorithm."""
    what: str
    paper: float
    ours: float
    tolerance: float
    """Half a unit of the last printed digit, or what the paper's own rounding explains."""

    @property
    def agrees(self) -> bool:
        return abs(self.paper - self.ours) <= self.tolerance


def exact_checks(each_id: str) -> list[ExactCheck]:
    """The checks of a table, figure or algorithm; none for most."""
    return list(_CHECKS[each_id](each_id)) if each_id in _CHECKS else []


def exact_ids() -> list[str]:
    return list(_CHECKS)


def _area_lost(each_id: str) -> Iterator[ExactCheck]:
    """LANS figure 1: sums of the learning rate over the steps, by equations 8 and 9."""
    figure = _figure(each_id)
    given, printed = figure["inputs"], figure["reported"]
    steps, warmup = given["T"], given["T_warmup"]

    def area(peak: float, constant: int = 0) -> float:
        schedule = build_schedule(
            "warmup_constant_linear", steps=steps, steps_per_epoch=1, warmup_steps=warmup, constant_steps=constant
        )
        return peak * sum(schedule(t) for t in range(1, steps + 1))

    high = area(given["eta_high"])
    gaps = {
        "area_gap_eq8_vs_eq8": high - area(given["eta_low"]),
        "area_gap_eq8_vs_eq9": high - area(given["eta_low"], given["T_const"]),
    }
    names = {"area_gap_eq8_vs_eq8": "area lost by the lower peak", "area_gap_eq8_vs_eq9": "and with the constant stage"}
    for key, ours in gaps.items():
        yield ExactCheck(each_id, names[key], printed[key], ours, figure["tolerance"])


def _lans_phases(each_id: str) -> Iterator[ExactCheck]:
    """LANS table 1: whole steps of warmup and constant stage, as percentages of the run."""
    for row in find_rows(each_id):
        schedule = build_schedule(
            "warmup_constant_linear",
            steps=row["steps"],
            steps_per_epoch=1,
            warmup_ratio=row["ratio_warmup_pct"] / 100,
            constant_ratio=row["ratio_const_pct"] / 100,
        )
        for what, ours in (("warmup", schedule.warmup_steps), ("const", schedule.constant_steps)):
            text = f"phase {row['stage']}: {what}, percent of {row['steps']} steps ({ours} steps)"
            half_a_step = 50 / row["steps"]
            yield ExactCheck(each_id, text, row[f"ratio_{what}_pct"], 100 * ours / row["steps"], half_a_step)


def _lamb_bert(each_id: str) -> Iterator[ExactCheck]:
    """LAMB table 4: every column from the one of batch 512."""
    base = find_rows("lamb/4", {"batch_size": _LAMB_BASE})[0]
    for row in find_rows("lamb/4"):
        sizes = _sizes(row)
        lr = scaling.scaled_lr(base["lr"], rule="sqrt", **sizes)
        yield ExactCheck(each_id, f"batch {row['batch_size']}: learning rate", row["lr"], lr, 1e-11)
    yield from _warmup_from_512(each_id)


def _warmup_from_512(each_id: str) -> Iterator[ExactCheck]:
    """LAMB tables 1, 2 and 4: 3125 warmup steps at every batch size, from the ratio at 512 and the sequences seen."""
    base = find_rows("lamb/4", {"batch_size": _LAMB_BASE})[0]
    printed = {row["batch_size"]: row for row in find_rows("lamb/4")}
    for batch in (row["batch_size"] for row in find_rows(each_id, {"optimizer": "lamb"})):
        if not isinstance(batch, int):
            continue  # two phases of different sizes
        row = printed[batch]
        steps = scaling.steps_for_epochs(1, _BERT_SEQUENCES, batch)
        ratio = scaling.scaled_warmup_epochs(base["warmup_ratio"], **_sizes(row))
        schedule = build_schedule("polynomial", steps=steps, steps_per_epoch=steps, warmup_ratio=ratio)
        wanted = row["warmup_ratio"] * row["derived"]["steps"]
        yield ExactCheck(each_id, f"batch {batch}: warmup steps", wanted, schedule.warmup_steps, 1e-6)


def _lamb_bert_runs(each_id: str) -> Iterator[ExactCheck]:
    """LAMB table 1: steps of all batch sizes, warmup steps too."""
    for row in find_rows(each_id, {"optimizer": "lamb"}):
        if isinstance(row["batch_size"], int):
            steps = scaling.steps_for_epochs(1, _BERT_SEQUENCES, row["batch_size"])
            yield ExactCheck(each_id, f"batch {row['batch_size']}: steps", row["steps"], steps, 0)
    yield from _warmup_from_512(each_id)
    yield from _mixed_batch(each_id)


def _mixed_batch(each_id: str) -> Iterator[ExactCheck]:
    """LAMB at 64K/32K: the ratios that LANS quotes (its own over 1.5) come to 2000 and 200 steps."""
    derived = {entry["id"]: entry["value"] for entry in load_paper("lamb")["derived"]}
    split, ratios = derived["mixed_batch_split"], derived["mixed_batch_warmup"]
    for phase, wanted in (("phase1", 2000), ("phase2", 200)):
        schedule = build_schedule("polynomial", steps=split[phase], steps_per_epoch=1, warmup_ratio=ratios[phase])
        yield ExactCheck(each_id, f"64K/32K, {phase}: warmup steps", wanted, schedule.warmup_steps, 1)


def _adamw_bert(each_id: str) -> Iterator[ExactCheck]:
    """LAMB table 8: warmup steps of the tuning runs; 1562.5 is rounded."""
    for row in find_rows(each_id):
        schedule = build_schedule("polynomial", steps=row["steps"], steps_per_epoch=1, warmup_ratio=row["warmup_ratio"])
        what = f"ratio {row['warmup_ratio']}, lr {row['lr']:g}: warmup steps"
        yield ExactCheck(each_id, what, row["warmup_steps"], schedule.warmup_steps, 0.5)


def _lamb_imagenet(each_id: str) -> Iterator[ExactCheck]:
    """LAMB table 5: every column from the one of batch 512."""
    base = find_rows(each_id, {"batch_size": _LAMB_BASE})[0]
    for row in find_rows(each_id):
        sizes, batch = _sizes(row), row["batch_size"]
        lr = scaling.scaled_lr(base["lr"], rule="sqrt", **sizes)
        warmup = scaling.scaled_warmup_epochs(base["warmup_epochs"], **sizes)
        yield ExactCheck(each_id, f"batch {batch}: learning rate", row["lr"], lr, 1e-11)
        yield ExactCheck(each_id, f"batch {batch}: warmup epochs", row["warmup_epochs"], warmup, 1e-9)


def _imagenet_steps(each_id: str) -> Iterator[ExactCheck]:
    """LAMB tables 9 to 25: 90 epochs at 16K are 7038 steps."""
    row = find_rows(each_id)[0]
    steps = scaling.steps_for_epochs(row["epochs"], _IMAGENET_TRAIN, row["batch_size"])
    yield ExactCheck(each_id, "steps", row["steps"], steps, 0)


def _bias_correction(each_id: str) -> Iterator[ExactCheck]:
    """LAMB figure 2: what Adam's bias correction multiplies a step by, measured on the zoo's own Adam direction.

    A gradient of 1 at step t, all before it 0: m = 1 - beta1 and v = 1 - beta2 whatever t is, so that the direction
    with correction over the one without is the factor.
    """
    figure = _figure(each_id)
    for key, printed in figure["computed"].items():
        t = int(key.removeprefix("t_"))
        ours = _direction(t, figure["inputs"], True) / _direction(t, figure["inputs"], False)
        yield ExactCheck(each_id, f"factor at step {t}", printed, ours, 5.1e-5)


def _direction(step: int, given: Mapping[str, float], bias_correction: bool) -> float:
    import torch

    from lbzoo.optim.adam_moments import adam_direction

    param, grad, first, second, direction = (torch.tensor([value], dtype=torch.float64) for value in (0, 1, 0, 0, 0.0))
    adam_direction(
        [param],
        [grad],
        [first],
        [second],
        [step],
        [direction],
        betas=(given["beta1"], given["beta2"]),
        eps=0.0,
        weight_decay=0.0,
        bias_correction=bias_correction,
    )
    return float(direction)


def _speedups(each_id: str) -> Iterator[ExactCheck]:
    """LAMB figure 8: speed-ups from the times of table 1."""
    figure = _figure(each_id)
    minutes = {str(row["batch_size"]): row["time_minutes"] for row in find_rows("lamb/1", {"optimizer": "lamb"})}
    base, printed = minutes["512"], figure["reported"]
    mixed = next(row["time_minutes"] for row in find_rows("lamb/1") if row.get("batch_label") == "64k/32k")
    chips = figure["inputs"]["tpus_ratio"]
    yield ExactCheck(each_id, "speed-up at 32K", printed["speedup_32k"], base / minutes["32768"], 0.05)
    yield ExactCheck(each_id, "speed-up at 64K/32K", printed["speedup_mixed"], base / mixed, 0.05)
    for what, key, time in (
        ("32K", "efficiency_32k_pct", minutes["32768"]),
        ("64K/32K", "efficiency_mixed_pct", mixed),
    ):
        yield ExactCheck(each_id, f"efficiency at {what}, percent", printed[key], 100 * base / time / chips, 0.11)


def _half_of_adams_memory(each_id: str) -> Iterator[ExactCheck]:
    """NovoGrad, algorithm 1: bytes of state after a step of NovoGrad over those of Adam, on the paper's ResNet-50.

    Above one half by a scalar for each of the layers, and by Adam's step counts below it.
    """
    from lbzoo.recipe import load_recipe
    from lbzoo.recipe.dry_run import dry_run
    from lbzoo.recipe.finding import PACKAGE_RECIPES

    (stage,) = load_recipe(PACKAGE_RECIPES / "resnet50_novograd_32k.yaml").stages
    (baseline,) = load_recipe(PACKAGE_RECIPES / "resnet50v2_adamw.yaml").stages
    novograd, adam = dry_run(stage), dry_run(baseline)
    assert novograd.parameters == adam.parameters
    assert novograd.optimizer_bytes is not None
    assert adam.optimizer_bytes is not None
    yield ExactCheck(each_id, "state, NovoGrad over Adam", 0.5, novograd.optimizer_bytes / adam.optimizer_bytes, 1e-3)


def _sizes(row: Mapping[str, Any]) -> dict[str, int]:
    return {"base_global_batch_size": _LAMB_BASE, "global_batch_size": row["batch_size"]}


def _figure(figure_id: str) -> dict[str, Any]:
    figures = load_paper(figure_id.partition("/")[0])["figures"]
    found: dict[str, Any] = next(figure for figure in figures if figure["id"] == figure_id)
    return found


_CHECKS: Mapping[str, Callable[[str], Iterator[ExactCheck]]] = {
    "lamb/1": _lamb_bert_runs,
    "lamb/2": _warmup_from_512,
    "lamb/4": _lamb_bert,
    "lamb/5": _lamb_imagenet,
    "lamb/8": _adamw_bert,
    **{f"lamb/{number}": _imagenet_steps for number in range(9, 26)},
    "lans/1": _lans_phases,
    "lamb/fig2": _bias_correction,
    "lamb/fig8": _speedups,
    "lans/fig1": _area_lost,
    "novograd/alg1": _half_of_adams_memory,
}
