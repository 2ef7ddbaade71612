"""``lbzoo plan``: the arithmetic of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lbzoo.cli.fit import ScaleName
from lbzoo.cli.row_option import RowOption

if TYPE_CHECKING:
    from lbzoo.recipe.arithmetic import BatchSum
    from lbzoo.recipe.planning import StagePlan


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one in the zoo.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    scale: Annotated[ScaleName, typer.Option(help="mini: embedded data and a small model.")] = ScaleName.paper,
    model: Annotated[bool, typer.Option("--model/--no-model", help="Count parameters and optimizer memory.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="May the recipe import code?")] = True,
    row: RowOption = None,
) -> None:
    """Print the sums of a run: batch, steps, warmup, learning rate, samples, shards, parameters, optimizer memory."""
    import dataclasses

    from lbzoo.cli.printing import print_json, print_notes
    from lbzoo.cli.row_option import load
    from lbzoo.recipe.planning import plan_stage

    resolved = load(recipe, row, overrides, scale.value, allow_plugins=plugins)
    stages = [plan_stage(resolved, stage, count_model=model) for stage in resolved.stages]
    steps = sum(stage.steps for stage in stages)
    if json:
        data = [dataclasses.asdict(stage) for stage in stages]
        print_json({"recipe": resolved.name, "scale": resolved.scale, "steps": steps, "stages": data})
        return
    typer.echo(f"{resolved.name} at scale {resolved.scale}")
    for stage in stages:
        if len(stages) > 1:
            typer.echo(f"\nstage {stage.name}")
        for label, text in _lines(stage):
            typer.echo(f"  {label:<15}{text}")
    if len(stages) > 1:
        typer.echo(f"\n{len(stages)} stages, {steps:,} steps")
    warnings = [text for stage in stages if stage.model for text in stage.model.warnings]
    print_notes([*resolved.notes, *dict.fromkeys(warnings)])


def _lines(stage: StagePlan) -> Iterator[tuple[str, str]]:
    for index, batch in enumerate(stage.batches):
        yield "" if index else "batch", _batch(stage, batch)
    counted = f" = {stage.steps_arithmetic}" if stage.steps_arithmetic else ""
    yield "steps", f"{stage.steps:,}{counted}; {stage.steps_per_epoch:,.2f} an epoch"
    yield "samples", f"{stage.samples:,} {stage.unit}: {stage.epochs:,.2f} epochs of {stage.num_train:,}"
    if (split := stage.shards) is not None:
        rotating = f"; {split.rotating:,} more take turns" if split.rotating else ""
        yield "virtual shards", f"{split.count:,}, one a micro-batch, of {split.samples:,} {stage.unit}{rotating}"
    if stage.lr is not None:
        yield "learning rate", f"{stage.lr:.6g}" + (f" = {stage.lr_arithmetic}" if stage.lr_arithmetic else "")
    yield "schedule", _schedule(stage)
    yield from _model_lines(stage)


def _batch(stage: StagePlan, batch: BatchSum) -> str:
    if batch.problem:
        return f"{batch.where}: {batch.problem}"
    device = batch.device or ("device" if batch.devices == 1 else "devices")
    nodes = f" x {batch.num_nodes:,} nodes" if batch.num_nodes > 1 else ""
    if batch.accumulation is None or stage.micro_batch_size is None:
        most = stage.global_batch_size // (batch.devices * batch.num_nodes)
        return (
            f"{stage.global_batch_size:,} on {batch.devices:,} {device}{nodes}, in micro-batches of up to {most:,}: "
            f"found when the run starts ({batch.where})"
        )
    return (
        f"{stage.global_batch_size:,} = {stage.micro_batch_size:,} x {batch.devices:,} {device}{nodes} "
        f"x {batch.accumulation:,} accumulated ({batch.where})"
    )


def _schedule(stage: StagePlan) -> str:
    rest = stage.steps - stage.warmup_steps - stage.constant_steps
    parts = [(stage.warmup_steps, "warmup"), (stage.constant_steps, "the peak"), (rest, stage.schedule)]
    return ", ".join(f"{count:,} step{'s' * (count != 1)} of {what}" for count, what in parts if count)


def _model_lines(stage: StagePlan) -> Iterator[tuple[str, str]]:
    if stage.model_problem:
        yield "parameters", f"cannot be counted: {stage.model_problem}"
    if stage.model is None:
        return
    size = stage.model
    yield "parameters", f"{size.parameters:,} in {size.tensors} tensors, {_bytes(size.weight_bytes)}"
    if size.optimizer_bytes is None:
        yield "optimizer", f"{stage.optimizer} does not say how much state it keeps"
    else:
        ratio = size.optimizer_bytes / max(size.weight_bytes, 1)
        yield "optimizer", f"{stage.optimizer} keeps {_bytes(size.optimizer_bytes)}, {ratio:.2f} x the weights"
    if size.average_bytes:
        yield "weight average", _bytes(size.average_bytes)
    if size.statistics_bytes:
        yield "gradient stats", f"{_bytes(size.statistics_bytes)} for squares, communicated along with the gradients"


def _bytes(count: int) -> str:
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"
