"""What a recipe may say: one model for every block of the YAML file.

The models hold the keys that every recipe shares, with their types, units and ranges. The options of a component (an
optimizer's betas, a data set's folder) stand beside these keys in the same block and are checked against the
component's own signature (``components.py``). ``lbzoo schema`` turns both into a JSON schema for editors.

Batch sizes count samples, steps are optimizer steps.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from lbzoo.errors import did_you_mean

Scale = Literal["paper", "mini", "smoke"]
RequeueSignal = Literal["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]
CompileMode = Literal[True, "max-autotune-no-cudagraphs"]

# Of each group one key may be given; a later layer's choice replaces an earlier layer's (``merging.py``).
LENGTH_KEYS = ("steps", "epochs")
WARMUP_KEYS = ("warmup_steps", "warmup_epochs", "warmup_ratio")
CONSTANT_KEYS = ("constant_steps", "constant_epochs", "constant_ratio")
LOGGER_NAMES = ("tensorboard", "csv", "wandb", "mlflow", "comet", "neptune")

Epochs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0, le=1)]


def _at_most_one(settings: BaseModel, keys: tuple[str, ...]) -> None:
    given = [key for key in keys if getattr(settings, key) is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(given)}, not {'both' if len(given) == 2 else 'all'}")


class Settings(BaseModel):
    """A block with a closed set of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ComponentSettings(BaseModel):
    """A registered component by name; every other key of the block is an option of that component."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """A registered name, or `package.module:Class`."""


class DataSettings(ComponentSettings):
    """The data set, and how many samples of it make a step. Accumulation is derived: global / (micro x devices)."""

    global_batch_size: PositiveInt
    """Samples an optimizer step, over all devices and micro-batches."""
    micro_batch_size: PositiveInt | Literal["auto"]
    """Samples one device takes at once. A whole number of micro-batches makes the global batch.

    `auto` finds the largest that fits into a GPU's memory when the run starts, and stays with it when it is resumed.
    The samples of a step depend on it, as do BatchNorm's statistics and those of the gradients.
    """


class ParamRule(BaseModel):
    """Options for the parameters that it matches, by name or by number of dimensions; later rules win."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    match: str | list[str] | None = None
    """Globs on parameter names as in `named_parameters()`: `["*.bias", "*norm*"]`."""
    ndim: int | list[int] | None = None
    """Numbers of dimensions: `1` takes biases and the scales of normalisation layers."""


class OptimizerSettings(ComponentSettings):
    """The optimizer. `lr` is the peak learning rate, before `lr_scaling`."""

    param_rules: list[ParamRule] = []
    """Options of single groups of parameters: `weight_decay`, `lr_scale`, `adapt`, ..."""
    reset: bool = True
    """In a stage after another: begin with fresh state; `false` goes on with that of the same optimizer before."""


class ScheduleSettings(ComponentSettings):
    """The learning rate over the optimizer steps of a stage: warmup, a constant part, then the named decay."""

    name: str = "constant"
    """The shape of the decay."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps of linear warmup from 0."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Epochs of linear warmup, rounded to the nearest step. `lr_scaling` scales them with the batch."""
    warmup_ratio: Ratio | None = None
    """Warmup as a fraction of the stage's steps, rounded to the nearest step."""
    constant_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps at the peak, between warmup and decay."""
    constant_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Epochs at the peak."""
    constant_ratio: Ratio | None = None
    """The time at the peak as a fraction of the stage's steps."""

    @model_validator(mode="after")
    def _one_length_each(self) -> ScheduleSettings:
        _at_most_one(self, WARMUP_KEYS)
        _at_most_one(self, CONSTANT_KEYS)
        return self


class LrScalingSettings(Settings):
    """Learning rate, and warmup given in epochs, for another batch size than the one they were tuned at.

    The learning rate grows by the rule, the warmup epochs linearly (LAMB paper, section 4.3) unless they are to stay.
    """

    rule: Literal["sqrt", "linear"]
    """How the learning rate grows with the global batch size."""
    base_global_batch_size: PositiveInt
    """The global batch size that `optimizer.lr` belongs to."""
    warmup: Literal["linear", "keep"] = "linear"
    """`linear`: warmup epochs grow with the batch, warmup steps stay; `keep`: they stay (Goyal et al. 2017)."""


class Interval(Settings):
    """A length of training: `{steps: 500}` or `{epochs: 1}`."""

    steps: PositiveInt | None = None
    """Optimizer steps."""
    epochs: Epochs | None = None
    """Passes over the training data."""

    @model_validator(mode="after")
    def _one_unit(self) -> Interval:
        _at_most_one(self, LENGTH_KEYS)
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs")
        return self


class FsdpSettings(Settings):
    """How `strategy: fsdp` shards the model."""

    shard_size: PositiveInt | None = None
    """Devices that share one copy of the model; every such group holds a copy (HSDP). All devices by default."""
    layers: list[str] | None = None
    """Units that are gathered one at a time: globs on classes (`*Block`) or on paths (`model.stages.*`) of modules.

    By default those that the task names; what is in none of them is one more unit.
    """
    reshard_after_forward: bool | None = None
    """Free a layer's gathered weights between forward and backward, for memory; without it, one gather less a step.

    By default true, unless the task's loss reads the weights themselves.
    """


class EmaSettings(Settings):
    """An exponential moving average of the weights, beside the weights that are trained. It begins with each stage."""

    decay: Annotated[float, Field(ge=0, lt=1)]
    """What an optimizer step leaves of the average: 0.9999 averages over about 10,000 steps, and less at the start."""
    every_steps: PositiveInt = 1
    """Optimizer steps between updates, each by as much as these steps together."""
    in_validation: bool = True
    """Validate with the averages: `val/...`, the best checkpoint and `lbzoo validate` are then theirs."""


class DivergenceSettings(Settings):
    """What tells that a run has diverged, apart from a loss or a gradient that is not finite, and what is done then."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop` ends the run with exit code 3; `skip` leaves out bad steps, for which the device is read before each step;
    `rollback` goes on from the last checkpoint with a smaller learning rate, on the same samples."""
    at_most: PositiveInt = 3
    """Rollbacks of a run, or steps skipped in a row; then it ends with exit code 3 all the same."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What each rollback multiplies the learning rate by, for the rest of the stage."""
    loss_spike: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 10.0
    """A loss is bad above so many times its moving average, which is over about 50 steps; null for never."""
    trust_ratio_drop: Annotated[float, Field(gt=0, lt=1)] | None = 1e-3
    """Trust ratios have collapsed when their mean over the layers is below this share of its moving average; null for
    never. They are looked at every `logging.every` steps."""


class TrainerSettings(Settings):
    """What runs the training, and on what."""

    engine: Literal["lightning", "accelerate"] = "lightning"
    """Both engines train the same steps on the same samples."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """`ddp` replicates the model, `fsdp` shards it (FSDP2); `auto` takes ddp on more than one device."""
    fsdp: FsdpSettings | None = None
    """How `strategy: fsdp` shards the model; null drops what a base says."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the layers that FSDP gathers, under any strategy, and compute the rest anew backward."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where there are any."""
    devices: PositiveInt | Literal["auto"] = "auto"
    """Devices of each node; `auto` takes all GPUs, or one process on a CPU."""
    num_nodes: PositiveInt = 1
    """Machines, each with `devices` devices."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    """Bits of the weights (`true`) or of the arithmetic alone (`mixed`)."""
    gradient_clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Global gradient norm above which gradients are scaled down; none by default."""
    compile: Literal[False] | CompileMode = False
    """Train through torch.compile, with the same numbers: the first step takes minutes, the others less than without.

    `max-autotune-no-cudagraphs` also tries several kernels for each multiplication. Validation is not compiled.
    """
    ema: EmaSettings | None = None
    """Keep an average of the weights; null drops what a base says."""
    divergence: DivergenceSettings | None = DivergenceSettings()
    """When a run has diverged, and what happens then; null: nobody looks."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Data-loading processes of each device."""
    timeout: Annotated[float, Field(gt=0)] = 1800
    """Seconds that a rank waits for another before the run is given up."""
    validate_every: Interval = Interval(epochs=1)
    """How often the validation set is run; it always runs at the end of a stage."""

    @model_validator(mode="after")
    def _fsdp_is_meant(self) -> TrainerSettings:
        if self.fsdp is not None and self.strategy != "fsdp":
            raise ValueError(f"fsdp has options, but strategy is {self.strategy}; set strategy: fsdp, or fsdp: null")
        return self


class CheckpointSettings(Settings):
    """When the state of the run is saved. The last state of every stage always is."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; by default one at each validation."""
    keep_last: PositiveInt = 1
    """How many of the newest checkpoints stay on disk."""
    save_best: bool = True
    """Keep the checkpoint with the best value of the task's monitored metric as well."""
    asynchronous: bool = False
    """Write while the training goes on, from a copy in the host's memory: as much again as weights and optimizer."""
    on_error: Literal["stop", "warn"] = "stop"
    """What a checkpoint that cannot be written (a full disk) does: end the run, or warn and go on without it."""
    requeue_signal: RequeueSignal = "SIGUSR1"
    """Saves and leaves, as SIGINT and SIGTERM do: what the scheduler sends before the job's time is over."""


class LoggingSettings(Settings):
    """Where scalars go, and how often. Every run also writes `metrics.jsonl`."""

    every: PositiveInt = 50
    """Optimizer steps between logged steps."""
    loggers: list[str] = ["tensorboard"]
    """`tensorboard`, `csv`, `wandb`, `mlflow`, `comet`, `neptune`, or `package.module:Class`."""

    @field_validator("loggers")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in LOGGER_NAMES and ":" not in name:
                raise ValueError(f"no logger named '{name}'{did_you_mean(name, LOGGER_NAMES)}")
        return names


class StageSettings(Settings):
    """One stage of a run. In the file it says what differs from the top level; this is the two together.

    A stage starts from the weights of the stage before.
    """

    name: str
    """Addresses the stage: `stages.seq128.optimizer.lr=0.01`."""
    steps: PositiveInt | None = None
    """Optimizer steps of the stage."""
    epochs: Epochs | None = None
    """Passes over the training data; the steps are rounded up."""
    task: ComponentSettings
    """Model, loss and metrics."""
    data: DataSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ScheduleSettings()
    lr_scaling: LrScalingSettings | None = None
    """How learning rate and warmup follow the batch size; not at all by default."""


class HardwareSettings(Settings):
    """What the paper ran the recipe on; `lbzoo plan` prints the arithmetic for it."""

    devices: PositiveInt
    """Devices of each node."""
    num_nodes: PositiveInt = 1
    """Machines, each with `devices` devices."""
    device: str = ""
    """The kind of device: `V100`, `TPU v3`."""


class TableSettings(Settings):
    """The line of a paper's table that the recipe runs again."""

    id: str
    """`paper/number`, as in `novograd/3`."""
    row: dict[str, Any]
    """Columns that pick one row of the table: `{batch_size: 32768}`."""


class Recipe(Settings):
    """A whole recipe file. The leading comment is its description."""

    version: Literal[1]
    """The version of this format."""
    base: str | None = None
    """A recipe to start from: a path relative to this file, or a name. A base has no base of its own."""
    plugins: list[str] = []
    """Python files, relative to this file, that register components of your own. They are imported on every rank."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of initialisation, sampling order and augmentation."""

    task: ComponentSettings | None = None
    """Model, loss and metrics."""
    data: DataSettings | None = None
    """The data set, and how many samples of it make a step."""
    optimizer: OptimizerSettings | None = None
    """The optimizer, its options and its parameter rules."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over the optimizer steps; constant by default."""
    lr_scaling: LrScalingSettings | None = None
    """How learning rate and warmup follow the batch size; not at all by default."""
    steps: PositiveInt | None = None
    """Optimizer steps of the run."""
    epochs: Epochs | None = None
    """Passes over the training data; the steps are rounded up."""
    stages: list[StageSettings] | None = None
    """Stages in order; each is the top level, changed by what it says itself. Without it the run is one stage."""

    trainer: TrainerSettings = TrainerSettings()
    callbacks: list[ComponentSettings] = []
    """Names, or names with options: `[trust_ratio, {name: gsnr, every: 50}]`."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()

    table: TableSettings | None = None
    """The line of a paper's table that the recipe runs again."""
    hardware: HardwareSettings | None = None
    """What the paper ran it on."""
    expect: dict[str, float] = {}
    """Metrics the paper reports, by the name they are logged under: `{val/top1: 0.7578}`."""
    mini: dict[str, Any] | None = None
    """Changes for `--scale mini`: the same recipe on embedded data and a small model, minutes on a laptop CPU."""
