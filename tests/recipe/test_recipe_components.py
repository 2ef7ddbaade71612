"""Components by name: the zoo's, other packages' classes, and plugin files; what the data's facts fill in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo.recipe import (
    RecipeError,
    build_callbacks,
    build_data,
    build_schedule,
    build_task,
    load_recipe,
    optimizer_factory,
)

PLUGIN = '''
from lbzoo import register_data, register_optimizer, register_task
from lbzoo.data.base import DataFacts, DataSource

@register_task("{name}_task")
class Task:
    """A task of a plugin."""
    def __init__(self, *, width: int, num_classes: int, input_shape: tuple[int, int, int], rate: float = 0.5):
        self.given = (width, num_classes, input_shape, rate)

@register_data("{name}_data")
class Data(DataSource):
    """Data of a plugin."""
    def __init__(self, *, size: int = 100):
        self.size = size
    def facts(self):
        return DataFacts(self.size, 10, 7, (1, 2, 3), "things")
    def prepare(self): ...
    def train_dataset(self, *, seed: int = 0): ...
    def val_dataset(self): ...

@register_optimizer("{name}_optimizer")
def optimizer(params, *, lr: float = 0.1, twist: int = 3):
    """An optimizer of a plugin."""
    import torch
    return torch.optim.SGD(params, lr=lr)
'''
RECIPE = """\
version: 1
plugins: [{file}]
task: {{name: {name}_task, width: 5}}
data: {{name: {name}_data, global_batch_size: 10, micro_batch_size: 5}}
optimizer: {{name: {name}_optimizer, twist: 4}}
steps: 3
"""


def plugin(write: Write, name: str, folder: str = "", text: str | None = None) -> str:
    """Write a plugin whose components begin with ``name`` (registries are per process); returns a recipe's text."""
    write((text or PLUGIN).format(name=name), f"{folder}{name}.py")
    return RECIPE.format(file=f"{name}.py", name=name)


def test_a_plugin_registers_what_the_recipe_names(write: Write) -> None:
    resolved = load_recipe(write(plugin(write, "whole")))
    (stage,) = resolved.stages
    assert stage.task.options == {"width": 5, "num_classes": 7, "input_shape": (1, 2, 3)}
    assert stage.optimizer.options == {"twist": 4}
    assert stage.num_train == 100
    assert resolved.plugins == (Path("whole.py").resolve(),)
    assert build_task(stage).given == (5, 7, (1, 2, 3), 0.5)  # type: ignore[attr-defined]
    assert build_data(stage).facts().unit == "things"


def test_the_recipe_may_set_what_the_facts_would(write: Write) -> None:
    text = plugin(write, "own").replace("width: 5", "width: 5, num_classes: 9")
    assert load_recipe(write(text)).stages[0].task.options["num_classes"] == 9


def test_plugin_options_are_checked_like_the_zoos(write: Write) -> None:
    text = plugin(write, "checked").replace("twist: 4", "twits: 4").replace("width: 5", "width: wide")
    with pytest.raises(RecipeError) as error:
        load_recipe(write(text))
    assert [str(problem) for problem in error.value.problems] == [
        "valid.yaml:3: task.width: expected a whole number, got 'wide'",
        "valid.yaml:5: optimizer.twits: optimizer 'checked_optimizer' has no option 'twits'; did you mean 'twist'?",
    ]


def test_plugins_are_relative_to_the_recipe_and_to_the_base(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write(plugin(write, "deep", "a/"), "a/base.yaml")
    top = write("version: 1\nbase: ../a/base.yaml\nplugins: [more.py]\nsteps: 4\n", "b/top.yaml")
    write("", "b/more.py")
    monkeypatch.chdir("b")
    resolved = load_recipe(top.name)
    assert resolved.plugins == ((Path("..") / base.with_name("deep.py")).resolve(), Path("more.py").resolve())
    assert resolved.document["plugins"] == [str(path) for path in resolved.plugins], "the run folder is elsewhere"


def test_a_plugin_may_import_its_neighbours(write: Write) -> None:
    write("WIDTH = 9", "their/neighbour_of_near.py")
    text = "from neighbour_of_near import WIDTH\n" + PLUGIN.replace("*, width: int", "*, width: int = WIDTH")
    path = write(plugin(write, "near", "their/", text).replace(", width: 5", ""), "their/near.yaml")
    assert build_task(load_recipe(path).stages[0]).given[0] == 9  # type: ignore[attr-defined]


def test_a_plugin_may_be_loaded_twice_and_edited_names_stay(write: Write) -> None:
    path = write(plugin(write, "twice"))
    assert load_recipe(path).hash == load_recipe(path).hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = 1 / 0\n", "broken.py failed on line 2: ZeroDivisionError: division by zero"),
        ("x = (\n", "broken.py failed on line 1: SyntaxError"),
        ("import no_such_package\n", "broken.py failed on line 1: ModuleNotFoundError"),
        (
            "from lbzoo import register_data\n@register_data('digits')\nclass D: ...\n",
            "the data name 'digits' is taken by",
        ),
    ],
)
def test_a_plugin_that_fails(write: Write, text: str, message: str) -> None:
    write(text, "broken.py")
    path = write(VALID.replace("version: 1", "version: 1\nplugins: [broken.py]"))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith("valid.yaml:3: plugins.0: ")
    assert message in str(error.value)


def test_plugins_and_foreign_classes_can_be_refused(write: Write) -> None:
    write("raise SystemExit('ran')", "code.py")
    text = VALID.replace("version: 1", "version: 1\nplugins: [code.py]")
    text = text.replace("[trust_ratio]", "['antigravity:x']").replace("novograd", "antigravity:Y")
    with pytest.raises(RecipeError) as error:
        load_recipe(write(text), allow_plugins=False)
    assert [str(problem) for problem in error.value.problems] == [
        "valid.yaml:3: plugins.0: 'code.py' is code, which --no-plugins refuses",
        "valid.yaml:7: optimizer.name: 'antigravity:Y' is code, which --no-plugins refuses",
        "valid.yaml:13: callbacks.0: 'antigravity:x' is code, which --no-plugins refuses",
    ]
    load_recipe(write(VALID.replace("novograd", "torch:AdamW")), allow_plugins=False)


def test_classes_of_other_packages_are_inspected(write: Write) -> None:
    text = VALID.replace("novograd", "torch:AdamW").replace(
        "[trust_ratio]", "[{name: 'fractions:Fraction', numerator: 3}]"
    )
    resolved = load_recipe(write(text))
    assert resolved.stages[0].optimizer.options == {"lr": 0.01, "betas": (0.95, 0.98)}
    assert resolved.callbacks[0].options == {"numerator": 3}
    with pytest.raises(RecipeError, match="optimizer 'torch:AdamW' has no option 'beta'; did you mean 'betas'"):
        load_recipe(write(text.replace("betas", "beta")))
    with pytest.raises(RecipeError, match=r"optimizer.betas.1: expected a number, got 'x'"):
        load_recipe(write(text.replace("0.98", "x")))
    with pytest.raises(RecipeError, match="has no option 'numerater'; did you mean 'numerator'"):
        load_recipe(write(text.replace("numerator", "numerater")))


def test_lists_become_tuples_where_a_tuple_is_asked_for(valid: Path) -> None:
    assert load_recipe(valid).stages[0].optimizer.options["betas"] == (0.95, 0.98)


def test_what_is_built_is_what_the_recipe_says(write: Write) -> None:
    import torch

    text = VALID.replace("  lr: 1e-2", "  lr: 1e-2\n  param_rules: [{match: '*bias', weight_decay: 0.5}]")
    resolved = load_recipe(write(text.replace("[trust_ratio]", "[{name: trust_ratio, every: 7}]")))
    (stage,) = resolved.stages
    (callback,) = build_callbacks(resolved)
    assert callback.every == 7  # type: ignore[attr-defined]
    optimizer = optimizer_factory(stage)(torch.nn.Linear(3, 2))
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(0.01, (0.95, 0.98))] * 2
    assert {group["weight_decay"]: group["param_names"] for group in optimizer.param_groups} == {
        0.0: ["weight"],
        0.5: ["bias"],
    }
    schedule = build_schedule(stage)
    assert (schedule.name, schedule.steps, schedule.warmup_steps) == ("cosine", 17, 3)


def test_resolving_imports_nothing_heavy(valid: Path) -> None:
    heavy = ("torch", "lightning", "timm", "torchvision", "sklearn")
    program = (
        f"import sys, lbzoo.recipe as r; r.load_recipe({str(valid)!r}); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
