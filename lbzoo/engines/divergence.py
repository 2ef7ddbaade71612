"""What a run does when it diverges: a report in its folder; under ``rollback``, another try from its last checkpoint.

Rollbacks stand in ``status.json``, so that a run that is resumed afterwards counts on, and has the same learning rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lbzoo.callbacks.divergence import Divergence, Finding
from lbzoo.callbacks.log_values import log_scalars
from lbzoo.callbacks.trainer_view import TrainerView, is_logged
from lbzoo.data.base import DataSource
from lbzoo.data.sampling import StreamSampler
from lbzoo.engines import distributed
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import DivergedError, LbzooError
from lbzoo.recipe import DivergenceSettings, ResolvedRecipe, Stage

_MICRO_BATCHES_SHOWN, _SAMPLES_SHOWN = 4, 12


class Rollbacks:
    """Those that a run has made so far, by ``settings``; None for a run that ends when it diverges."""

    def __init__(self, run: RunFolder, settings: DivergenceSettings | None) -> None:
        self._run = run
        self._settings = settings if settings is not None and settings.policy == "rollback" else None
        self.made: list[dict[str, Any]] = distributed.on_rank_zero(lambda: list(run.status().get("rollbacks") or []))

    def lr_factor(self, stage: Stage) -> float:
        """On the learning rate of a stage: each rollback in it has multiplied it."""
        return math.prod(float(made["lr_factor"]) for made in self.made if made["stage"] == stage.name)

    def make(self, error: DivergedError, stage: Stage, to_step: int) -> None:
        """Note one more in ``status.json``, or raise ``error`` where none is allowed. On every rank."""
        settings = self._settings
        if settings is None:
            raise error
        if len(self.made) >= settings.at_most:
            raise DivergedError(f"after {len(self.made)} rollbacks: {error}", step=error.step) from error
        self.made.append({"step": error.step, "to_step": to_step, "stage": stage.name, "lr_factor": settings.lr_factor})
        distributed.on_rank_zero(lambda: self._run.write_status("running", rollbacks=self.made, step=to_step))


class LogRollbacks(Callback):
    """``summary/rollbacks``: how many the run has made, on logged steps."""

    def __init__(self, count: int, *, every: int) -> None:
        self._count, self._every = count, every

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and is_logged(trainer.global_step, self._every):
            log_scalars(trainer, {"summary/rollbacks": self._count}, trainer.global_step)


def scaled(schedule: Callable[[int], float], factor: float) -> Callable[[int], float]:
    """The schedule times a factor; itself for 1."""
    return schedule if factor == 1.0 else lambda step: factor * schedule(step)


def divergence_monitor(
    recipe: ResolvedRecipe, stage: Stage, source: DataSource, run: RunFolder, *, world_size: int
) -> Divergence | None:
    """The recipe's, which writes its reports into the run folder."""
    settings = recipe.trainer.divergence
    if settings is None:
        return None

    def report(finding: Finding) -> str:
        samples = _samples(recipe, stage, source, finding.step, world_size)
        try:
            file = write_report(run, finding, samples, stage=stage.name, policy=settings.policy)
            if monitor.skipped:
                run.write_status("running", skipped_steps=monitor.skipped)
            where = f"all of it: {file}"
        except (OSError, LbzooError) as error:  # a full disk: what the run does about the step goes on
            where = f"the report could not be written: {error}"
        lines = [f"rank {r}, micro-batch {m}: samples {_few(samples[r][m])}" for r, m in finding.worst_micro_batches()]
        return "\n  ".join([*lines[:_MICRO_BATCHES_SHOWN], where])

    monitor = Divergence(
        policy="skip" if settings.policy == "skip" else "stop",
        at_most=settings.at_most,
        loss_spike=settings.loss_spike,
        trust_ratio_drop=settings.trust_ratio_drop,
        every=recipe.logging.every,
        on_bad_step=report,
    )
    return monitor


def write_report(run: RunFolder, finding: Finding, samples: list[list[list[int]]], *, stage: str, policy: str) -> Path:
    """``divergence/step_00000012.json``: the finding, and the ids of the step's samples by rank and micro-batch."""
    worst = [
        {"rank": rank, "micro_batch": number, "samples": samples[rank][number]}
        for rank, number in finding.worst_micro_batches()
    ]
    content = {"stage": stage, "policy": policy, **asdict(finding), "worst_micro_batches": worst, "samples": samples}
    folder = run.path / "divergence"
    folder.mkdir(exist_ok=True)
    name = f"step_{finding.step:08d}"
    earlier = len(list(folder.glob(f"{name}*.json")))  # the same step before a rollback
    path = folder / (f"{name}.{earlier + 1}.json" if earlier else f"{name}.json")
    path.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")
    return path


def _samples(
    recipe: ResolvedRecipe, stage: Stage, source: DataSource, step: int, world_size: int
) -> list[list[list[int]]]:
    """The ids [ranks][micro-batches][samples] of an optimizer step of the run: arithmetic, as the sampler's."""
    sampler = StreamSampler(
        num_samples=stage.num_train,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        seed=recipe.seed,
        steps=stage.steps,
        preshuffled=source.preshuffled,
    )
    of_stage = step - 1 - stage.first_step
    keys = [sampler.micro_batch(of_stage, shard) for shard in sampler.shards]
    per_rank = len(keys) // world_size
    ids = [[key.index for key in micro_batch] for micro_batch in keys]
    return [ids[rank * per_rank : (rank + 1) * per_rank] for rank in range(world_size)]


def _few(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:_SAMPLES_SHOWN])) + (", ..." if len(ids) > _SAMPLES_SHOWN else "")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
