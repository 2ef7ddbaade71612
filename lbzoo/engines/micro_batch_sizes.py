"""The micro-batch sizes of a run whose recipe says ``auto``: found once, kept in its folder, the same ever after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lbzoo.engines.launch import World
from lbzoo.engines.opening import Say, recipe_text, recorded_sizes
from lbzoo.engines.run_folder import RunFolder
from lbzoo.errors import UsageError
from lbzoo.recipe import ResolvedRecipe, with_micro_batch_sizes

if TYPE_CHECKING:
    from lbzoo.data.base import DataSource


def check_sizes_can_be_found(resolved: ResolvedRecipe, world: World) -> None:
    """Raise UsageError where ``micro_batch_size: auto`` has nothing to go by."""
    if not any(stage.finds_micro_batch_size for stage in resolved.stages):
        return
    advice = "name it, as in data.micro_batch_size=32"
    if world.accelerator == "cpu":
        raise UsageError(f"micro_batch_size: auto fills a GPU's memory, and this run is on a CPU; {advice}")
    if resolved.trainer.strategy == "fsdp":
        raise UsageError(
            "micro_batch_size: auto tries sizes on each device by itself, where strategy: fsdp needs all of them "
            f"together; {advice}"
        )


def with_found_sizes(
    resolved: ResolvedRecipe, sources: Mapping[str, DataSource], world: World, run: RunFolder, say: Say
) -> ResolvedRecipe:
    """The recipe with every micro-batch size in it, as an earlier start of the run has found them, or found now.

    What is found goes into the run's ``recipe.yaml`` and ``status.json``. Collective.
    """
    from lbzoo.engines import distributed

    resolved = with_micro_batch_sizes(resolved, distributed.on_rank_zero(lambda: recorded_sizes(run)))
    if not any(stage.finds_micro_batch_size for stage in resolved.stages):
        return resolved
    check_sizes_can_be_found(resolved, world)
    from lbzoo.engines.micro_batch import find_micro_batch_sizes

    say("trying micro-batch sizes")
    sizes = find_micro_batch_sizes(resolved, sources, world)
    found = with_micro_batch_sizes(resolved, sizes)
    if world.rank == 0:
        run.write_recipe(recipe_text(found))
        run.write_status("running", micro_batch_sizes=sizes, recipe_hash=found.hash)
    for stage in found.stages:
        if stage.name in sizes:
            micro, devices = stage.micro_batch_size, world.world_size
            times = stage.global_batch_size // (micro * devices)
            sums = f"{stage.global_batch_size:,} = {micro:,} x {devices:,} devices x {times:,} accumulated"
            say(f"micro_batch_size of stage {stage.name}: {micro:,} ({sums})")
    return found
