"""Recipes from somewhere else: YAML runs nothing, and code comes in only where a recipe names it, unless refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbzoo.cli import main
from lbzoo.recipe import RecipeError, load_recipe

RECIPE = """\
version: 1
task: {name: linear_regression}
data: {name: linear_regression, global_batch_size: 64, micro_batch_size: 32}
optimizer: {name: sgd, lr: 0.1}
steps: 2
"""
CODE = "from pathlib import Path\nPath(__file__).with_name('was_here').touch()\n\n\nclass Thing:\n    pass\n"


def write(folder: Path, more: str, recipe: str = RECIPE) -> Path:
    path = folder / "hostile.yaml"
    path.write_text(recipe + more)
    (folder / "evil_module.py").write_text(CODE)
    return path


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [was_here]",
        "!!python/object/new:os.mkdir [was_here]",
        "!!python/name:os.system",
        "!!python/module:evil_module",
    ],
)
def test_yaml_builds_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"seed|python"):
        load_recipe(write(tmp_path, f"seed: {value}\n"))
    assert not (tmp_path / "was_here").exists()


PLACES = {
    "plugins": "plugins: [./evil_module.py]\n",
    "callback": "callbacks: ['evil_module:Thing']\n",
    "logger": "logging: {loggers: ['evil_module:Thing']}\n",
    "stage": "stages: [{name: a, optimizer: {name: 'evil_module:Thing'}}]\n",
    "mini": "mini: {optimizer: {name: 'evil_module:Thing'}}\n",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_plugins_refuses_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every place in which a recipe can name code, by name and line, before any of it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path, PLACES[place])
    scale = "mini" if place == "mini" else "paper"
    with pytest.raises(RecipeError, match=r"hostile\.yaml:6: .*is code, which --no-plugins refuses"):
        load_recipe(path, scale=scale, allow_plugins=False)
    scaled = ["--scale", scale]
    for verb in (["fit", *scaled], ["plan", *scaled], ["show", *scaled], *([["check"]] if scale == "paper" else [])):
        with pytest.raises(SystemExit) as left:
            main([*verb, str(path), "--no-plugins"])
        assert left.value.code == 2
        assert "is code, which --no-plugins refuses" in capsys.readouterr().err
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("kind", ["task", "data", "optimizer", "schedule"])
def test_nor_by_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="is code"):
        load_recipe(write(tmp_path, ""), [f"{kind}.name=evil_module:Thing"], allow_plugins=False)
    assert not (tmp_path / "was_here").exists()


def test_what_is_no_code_is_not_refused(tmp_path: Path) -> None:
    """torch's and timm's optimizers are libraries', not the recipe's choice of code."""
    path = write(tmp_path, "")
    assert load_recipe(path, ["optimizer.name=torch:SGD"], allow_plugins=False).stages[0].optimizer.name == "torch:SGD"
