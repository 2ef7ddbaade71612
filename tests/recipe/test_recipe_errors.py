"""Every kind of mistake, with its exact line, its path and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo.errors import UsageError
from lbzoo.recipe import RecipeError, load_recipe


def messages(path: Path, *overrides: str, scale: str = "paper") -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides, scale)  # type: ignore[arg-type]
    return [str(problem) for problem in error.value.problems]


def test_the_valid_recipe_is_valid(valid: Path) -> None:
    assert load_recipe(valid).stages[0].optimizer.name == "novograd"


# (what is replaced, by what, the one message that follows)
ONE_MISTAKE = [
    # keys of the recipe
    ("epochs: 3", "epcohs: 3", "valid.yaml:10: epcohs: unknown key; did you mean 'epochs'?"),
    ("optimizer:", "optimzer:", "valid.yaml:5: optimzer: unknown key; did you mean 'optimizer'?"),
    ("epochs: 3", "epochs: 3\nfoo: 1", "valid.yaml:11: foo: unknown key; known: base, callbacks, checkpoint, "),
    ("epochs: 3", "epochs: 3\ndevices: 8", "valid.yaml:11: devices: unknown key; did you mean 'trainer.devices'?"),
    ("epochs: 3", "epochs: 3\nlr: 0.1", "valid.yaml:11: lr: unknown key; did you mean 'optimizer.lr'?"),
    (
        "epochs: 3",
        "epochs: 3\nbatch_size: 8",
        "valid.yaml:11: batch_size: unknown key; did you mean 'data.global_batch_size'?",
    ),
    ("epochs: 3", "max_epochs: 3", "valid.yaml:10: max_epochs: unknown key; did you mean 'epochs'?"),
    ("precision: ", "precison: ", "valid.yaml:11: trainer.precison: unknown key; did you mean 'precision'?"),
    (
        "{precision: bf16-mixed}",
        "{validate_every: {step: 5}}",
        "valid.yaml:11: trainer.validate_every.step: unknown key; did you mean 'steps'?",
    ),
    ("  epochs: 1", "  epoch: 1", "valid.yaml:14: mini.epoch: unknown key; did you mean 'epochs'?"),
    ("  epochs: 1", "  base: x", "valid.yaml:14: mini.base: 'base' belongs to the recipe, not to its mini: block"),
    ("epochs: 3", "epochs: 3\nepochs: 4", "valid.yaml:11: epochs: this key is given twice (first on line 10)"),
    # what is required
    ("version: 1\n", "", "valid.yaml:1: version: required, but missing"),
    ("version: 1", "version: 2", "valid.yaml:2: version: expected 1, got 2"),
    (", micro_batch_size: 32", "", "valid.yaml:4: data.micro_batch_size: required, but missing"),
    ("epochs: 3\n", "", "valid.yaml:1: the recipe does not say how long to train: give epochs or steps"),
    ("epochs: 3", "epochs: 3\nsteps: 4", "valid.yaml:10: epochs: give steps or epochs, not both"),
    (", model: resnetv2_50", "", "valid.yaml:3: task: task 'image_classification' needs the option 'model'"),
    ("  name: novograd\n", "", "valid.yaml:5: optimizer.name: required, but missing"),
    # names of components
    (
        "image_classification",
        "image_clasification",
        "valid.yaml:3: task.name: no task named 'image_clasification'; did you mean 'image_classification'?",
    ),
    ("name: digits", "name: digts", "valid.yaml:4: data.name: no data named 'digts'; did you mean 'digits'?"),
    ("novograd", "novogard", "valid.yaml:6: optimizer.name: no optimizer named 'novogard'; did you mean 'novograd'?"),
    ("cosine", "cosin", "valid.yaml:9: schedule.name: no schedule named 'cosin'; did you mean 'cosine'?"),
    (
        "[trust_ratio]",
        "[trust_ratios]",
        "valid.yaml:12: callbacks.0: no callback named 'trust_ratios'; did you mean 'trust_ratio'?",
    ),
    ("novograd", "torch:Adm", "valid.yaml:6: optimizer.name: no optimizer in torch.optim named 'Adm'; did you mean '"),
    (
        "[trust_ratio]",
        "[no_such.module:Class]",
        "valid.yaml:12: callbacks.0: cannot import 'no_such.module': No module named 'no_such'",
    ),
    (
        "[trust_ratio]",
        "['collections:OrderedDit']",
        "valid.yaml:12: callbacks.0: module 'collections' has no 'OrderedDit'; did you mean 'OrderedDict'?",
    ),
    # options of components
    (
        "betas:",
        "beta:",
        "valid.yaml:8: optimizer.beta: optimizer 'novograd' has no option 'beta'; did you mean 'betas'?",
    ),
    (
        "  lr: 1e-2",
        "  learning_rate: 1e-2",
        "valid.yaml:7: optimizer.learning_rate: optimizer 'novograd' has no option 'learning_rate'; did you mean 'lr'?",
    ),
    (
        "global_batch_size: 256",
        "batch_size: 256",
        "valid.yaml:4: data.batch_size: data 'digits' has no option 'batch_size'; did you mean 'global_batch_size'?",
    ),
    (
        "warmup_epochs",
        "warmup_epoch",
        "valid.yaml:9: schedule.warmup_epoch: schedule 'cosine' has no option 'warmup_epoch'; did you mean",
    ),
    (
        "[trust_ratio]",
        "[{name: trust_ratio, evry: 5}]",
        "valid.yaml:12: callbacks.0.evry: callback 'trust_ratio' has no option 'evry'; did you mean 'every'?",
    ),
    # types and ranges
    ("epochs: 3", "epochs: '3'", "valid.yaml:10: epochs: expected a number, got '3'; write 3, without quotes"),
    ("epochs: 3", "epochs: 0", "valid.yaml:10: epochs: expected a number greater than 0, got 0"),
    ("epochs: 3", "epochs: .inf", "valid.yaml:10: epochs: expected a finite number, got inf"),
    ("epochs: 3", "epochs: true", "valid.yaml:10: epochs: expected a number, got true"),
    ("epochs: 3", "steps: 2.0", "valid.yaml:10: steps: expected a whole number, got 2.0; write 2"),
    ("256", "'32,768'", "valid.yaml:4: data.global_batch_size: expected a whole number, got '32,768'; write 32768"),
    ("256", "1_024", "valid.yaml:4: data.global_batch_size: expected a whole number, got '1_024'; write 1024"),
    (
        "bf16-mixed",
        "bf16-mixd",
        "valid.yaml:11: trainer.precision: expected '32-true', 'bf16-mixed', '16-mixed', 'bf16-true' or '64-true', "
        "got 'bf16-mixd'; did you mean 'bf16-mixed'?",
    ),
    (
        "{precision: bf16-mixed}",
        "{devices: many}",
        "valid.yaml:11: trainer.devices: expected a whole number or 'auto', got 'many'",
    ),
    ("{precision: bf16-mixed}", "ddp", "valid.yaml:11: trainer: expected a mapping (`key: value` lines), got 'ddp'"),
    (
        "{precision: bf16-mixed}",
        "{validate_every: {}}",
        "valid.yaml:11: trainer.validate_every: give steps or epochs",
    ),
    (
        "{precision: bf16-mixed}",
        "{validate_every: {steps: 1, epochs: 1}}",
        "valid.yaml:11: trainer.validate_every: give one of steps, epochs, not both",
    ),
    (
        "warmup_epochs: 0.5",
        "warmup_epochs: 0.5, warmup_ratio: 0.1",
        "valid.yaml:9: schedule: give one of warmup_epochs, warmup_ratio, not both",
    ),
    (
        "warmup_epochs: 0.5",
        "warmup_ratio: 2",
        "valid.yaml:9: schedule.warmup_ratio: expected a number of at most 1, got 2",
    ),
    ("[0.95, 0.98]", "[0.95]", "valid.yaml:8: optimizer.betas: too few values: [0.95]"),
    ("[0.95, 0.98]", "[0.95, 0.98, 1]", "valid.yaml:8: optimizer.betas: too many values: [0.95, 0.98, 1]"),
    ("[0.95, 0.98]", "[0.95, x]", "valid.yaml:8: optimizer.betas.1: expected a number, got 'x'"),
    ("[0.95, 0.98]", "0.95", "valid.yaml:8: optimizer.betas: expected a list, got 0.95"),
    (
        "[0.95, 0.98]",
        "[0.95, 1.5]",
        "valid.yaml:8: optimizer.betas: must be two numbers, each at least 0 and below 1, got",
    ),
    ("lr: 1e-2", "lr: -1", "valid.yaml:7: optimizer.lr: must be a finite number of 0 or more, got -1"),
    ("lr: 1e-2", "lr: .nan", "valid.yaml:7: optimizer.lr: must be a finite number of 0 or more, got nan"),
    ("lr: 1e-2", "lr:", "valid.yaml:7: optimizer.lr: expected a number, got nothing"),
    ("[trust_ratio]", "trust_ratio", "valid.yaml:12: callbacks: expected a list, got 'trust_ratio'"),
    ("[trust_ratio]", "[3]", "valid.yaml:12: callbacks.0: expected a mapping (`key: value` lines), got 3"),
    ("epochs: 3", "epochs: 3\nseed: -1", "valid.yaml:11: seed: expected a number of at least 0, got -1"),
    (
        "epochs: 3",
        "epochs: 3\nlogging: {loggers: [tensorbord]}",
        "valid.yaml:11: logging.loggers: no logger named 'tensorbord'; did you mean 'tensorboard'?",
    ),
    (
        "epochs: 3",
        "epochs: 3\nlr_scaling: {rule: squrt, base_global_batch_size: 8}",
        "valid.yaml:11: lr_scaling.rule: expected 'sqrt' or 'linear', got 'squrt'; did you mean 'sqrt'?",
    ),
    # arithmetic
    (
        "256",
        "250",
        "valid.yaml:4: data.global_batch_size: global_batch_size 250 is no multiple of micro_batch_size 32 x 1 device",
    ),
    (
        "{precision: bf16-mixed}",
        "{devices: 3}",
        "valid.yaml:4: data.global_batch_size: global_batch_size 256 is no multiple of micro_batch_size 32 x 3 devices",
    ),
    (
        "256, micro_batch_size: 32",
        "4096, micro_batch_size: 1",
        "valid.yaml:4: data.global_batch_size: data 'digits' has 1437 training samples, fewer than the 4096",
    ),
    (
        "warmup_epochs: 0.5",
        "warmup_steps: 99",
        "valid.yaml:9: schedule: schedule cosine: warmup is longer than the run",
    ),
    (
        "name: digits",
        "name: digits, image_size: 4",
        "valid.yaml:4: data: data digits: image_size must be at least 8, the size of the scans, got 4",
    ),
    (
        "epochs: 3",
        "epochs: 3\noptimizer: {name: adamw}",
        "valid.yaml:11: optimizer: this key is given twice (first on line 5)",
    ),
    # parameter rules
    (
        "  lr: 1e-2",
        "  param_rules: [{match: '*.bias', weight_dcay: 0.0}]",
        "valid.yaml:7: optimizer.param_rules.0.weight_dcay: optimizer 'novograd' has no option 'weight_dcay'; did",
    ),
    (
        "  lr: 1e-2",
        "  param_rules: [{weight_decay: 0.0}]",
        "valid.yaml:7: optimizer.param_rules.0: a rule needs match or ndim",
    ),
    ("  lr: 1e-2", "  param_rules: [{ndim: 1}]", "valid.yaml:7: optimizer.param_rules.0: a rule sets an option"),
    (
        "  lr: 1e-2",
        "  param_rules: [{ndim: 1, weight_decay: -1.0}]",
        "valid.yaml:7: optimizer.param_rules.0.weight_decay: must be a finite number of 0 or more, got -1.0",
    ),
    # plugins and bases
    ("epochs: 3", "epochs: 3\nplugins: [none.py]", "valid.yaml:11: plugins.0: no file "),
    ("version: 1", "version: 1\nbase: nothing_like_it", "valid.yaml:3: base: no recipe named 'nothing_like_it'"),
    ("version: 1", "version: 1\nbase: other.yaml", "valid.yaml:3: base: no recipe file 'other.yaml'"),
    ("version: 1", "version: 1\nbase: valid.yaml", "valid.yaml:3: base: this recipe is a base already"),
]


@pytest.mark.parametrize(("old", "new", "message"), ONE_MISTAKE, ids=[message for *_, message in ONE_MISTAKE])
def test_one_mistake(write: Write, old: str, new: str, message: str) -> None:
    assert VALID.count(old) >= 1
    found = messages(write(VALID.replace(old, new, 1)))
    assert [each for each in found if not each.startswith(message)] == []
    assert len(found) == 1


def test_all_mistakes_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = (
        VALID.replace("resnetv2_50", "3")
        .replace("optimizer:", "optimzer:")
        .replace("novograd", "novogard")
        .replace("cosine", "cosin")
        .replace("epochs: 3", "epochs: many")
        .replace("bf16-mixed", "bf17")
        .replace("trust_ratio", "trust")
    )
    found = messages(write(text))
    places = [each.split(":")[1] for each in found]
    assert places == ["3", "5", "6", "9", "10", "11", "12"]
    assert "did you mean 'novograd'" in found[2], "a misspelt block is looked into"


def test_the_message_lists_and_counts(write: Write) -> None:
    path = write(VALID.replace("novograd", "novogard").replace("cosine", "cosin"))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[-1] == "2 mistakes"
    assert isinstance(error.value, UsageError)
    assert error.value.exit_code == 2


def test_a_mistake_in_the_base_is_placed_in_the_base(write: Write) -> None:
    write(VALID.replace("novograd", "novogard"), "base.yaml")
    found = messages(write("version: 1\nbase: base.yaml\nepochs: none\n", "top.yaml"))
    assert found[0].startswith("base.yaml:6: optimizer.name: no optimizer named 'novogard'")
    assert found[1] == "top.yaml:3: epochs: expected a number, got 'none'"


def test_a_base_that_cannot_be_read(write: Write) -> None:
    write("a: [1\n", "base.yaml")
    found = messages(write("version: 1\nbase: base.yaml\nepochs: none\n", "top.yaml"))
    assert found[0].startswith("base.yaml:2: not YAML")
    assert "top.yaml:3: epochs: expected a number, got 'none'" in found


def test_mistakes_of_the_mini_block_are_found_at_that_scale(write: Write) -> None:
    path = write(VALID.replace("  epochs: 1", "  optimizer: {lr: fast}\n  stages: {a: {steps: 1}}"))
    load_recipe(path)
    found = messages(path, scale="mini")
    assert found == [
        "valid.yaml:14: mini.optimizer.lr: expected a number, got 'fast'",
        "valid.yaml:15: mini.stages.a: no stage named 'a'; this recipe has no stages",
    ]


def test_no_mini_block(write: Write) -> None:
    path = write(VALID[: VALID.index("mini:")])
    assert messages(path, scale="mini") == [
        "valid.yaml:1: the recipe has no mini: block, so it cannot run at --scale mini"
    ]


def test_lr_scaling_needs_a_rate(write: Write) -> None:
    path = write(VALID.replace("  lr: 1e-2\n", "") + "lr_scaling: {rule: sqrt, base_global_batch_size: 8}\n")
    assert messages(path) == ["valid.yaml:14: lr_scaling: scales optimizer.lr, which the recipe does not set"]


def test_files_outside_the_working_folder_are_named_in_full(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(VALID.replace("novograd", "novogard")).resolve()
    other = path.parent / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    assert messages(path)[0].startswith(f"{path}:6: optimizer.name")
