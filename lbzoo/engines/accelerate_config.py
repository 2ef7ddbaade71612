"""What ``accelerate launch`` and its config file say, compared with the recipe, for either engine.

accelerate passes its settings on in environment variables, and a script's own arguments overrule most of them without
a word. A run is what its recipe says; where accelerate says something else, that is an error that names both.
Nothing here imports accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from lbzoo.errors import UsageError
from lbzoo.recipe.schema import TrainerSettings

_PRECISION = {"bf16-mixed": "bf16", "16-mixed": "fp16"}
_UNKNOWN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def is_accelerate_launch(variables: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` started this process: all its launchers set the precision."""
    return "ACCELERATE_MIXED_PRECISION" in variables


def asked_for_several(variables: Mapping[str, str]) -> bool:
    """Whether it was to start several processes: on a CPU it then sets their meeting point and starts one."""
    return is_accelerate_launch(variables) and {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys()


def wants_cpu(variables: Mapping[str, str]) -> bool:
    return is_accelerate_launch(variables) and _is_true(variables, "ACCELERATE_USE_CPU")


def check_accelerate(settings: TrainerSettings, *, on_gpu: bool, variables: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError with every point in which accelerate's configuration contradicts the recipe, or if the recipe
    wants it and it is not installed.

    The number of processes is :func:`lbzoo.engines.launch.find_world`'s to compare.
    """
    if settings.engine == "accelerate" and find_spec("accelerate") is None:
        raise UsageError("trainer.engine: no accelerate here: pip install 'lbzoo[accelerate]', or use lightning")
    if not is_accelerate_launch(variables):
        return
    conflicts = [
        *_precision(settings, variables),
        *_sharding(settings, variables, on_gpu=on_gpu),
        *_compilation(settings, variables),
        *(
            f"it is set up for {name}, which no recipe has: choose DDP or FSDP2 with `accelerate config`"
            for variable, name in _UNKNOWN.items()
            if _is_true(variables, variable)
        ),
    ]
    if wants_cpu(variables) and on_gpu:
        conflicts.append(f"it says use_cpu, the recipe trainer.accelerator={settings.accelerator}: set both alike")
    if conflicts:
        raise UsageError("accelerate launch contradicts the recipe:\n" + "\n".join(f"  - {text}" for text in conflicts))


def _precision(settings: TrainerSettings, variables: Mapping[str, str]) -> Iterator[str]:
    wanted, said = _PRECISION.get(settings.precision, "no"), variables["ACCELERATE_MIXED_PRECISION"].lower()
    if said != wanted:
        by_default = " (which it takes where nothing says otherwise)" if said == "no" else ""
        yield (
            f"it says mixed_precision={said}{by_default}, the recipe trainer.precision={settings.precision}: "
            f"accelerate launch --mixed_precision {wanted}{_other_recipe(said)}"
        )


def _other_recipe(said: str) -> str:
    names = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    return f", or trainer.precision={names[said]}" if said in names else ""


def _sharding(settings: TrainerSettings, variables: Mapping[str, str], *, on_gpu: bool) -> Iterator[str]:
    said, wanted = _is_true(variables, "ACCELERATE_USE_FSDP"), settings.strategy == "fsdp"
    if said and not wanted:
        yield (
            f"it says FSDP, the recipe trainer.strategy={settings.strategy}: set trainer.strategy=fsdp, or use DDP in "
            "accelerate's config"
        )
    if said and variables.get("FSDP_VERSION", "1") != "2":
        yield (
            f"it says fsdp_version={variables.get('FSDP_VERSION', '1')}, lbzoo shards with FSDP2 (the flat parameters "
            "of version 1 break layer-wise optimizers): fsdp_version: 2"
        )
    if said and _is_true(variables, "FSDP_OFFLOAD_PARAMS"):
        yield "it says fsdp_offload_params, which no recipe has: set it to false"
    if said and _is_true(variables, "FSDP_ACTIVATION_CHECKPOINTING") != settings.activation_checkpointing:
        yield (
            f"it says fsdp_activation_checkpointing={variables.get('FSDP_ACTIVATION_CHECKPOINTING', 'false')}, the "
            f"recipe trainer.activation_checkpointing={str(settings.activation_checkpointing).lower()}: set both alike"
        )
    if wanted and not said and on_gpu:  # on a CPU it never says FSDP
        yield (
            "it says no FSDP, the recipe trainer.strategy=fsdp: accelerate launch --use_fsdp --fsdp_version 2, or "
            "start the run with torchrun"
        )


def _compilation(settings: TrainerSettings, variables: Mapping[str, str]) -> Iterator[str]:
    said = variables.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if said != "no" and not (said == "inductor" and settings.compile):
        yield (
            f"it says dynamo_backend={said}, the recipe trainer.compile={str(settings.compile).lower()}: "
            "dynamo_backend: 'no', and trainer.compile for torch.compile with inductor"
        )


def _is_true(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "false").lower() in ("true", "1", "yes")
