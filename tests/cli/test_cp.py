"""``lbzoo cp``: never overwrites."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbzoo.cli.cp import cp
from lbzoo.errors import UsageError
from lbzoo.recipe import load_recipe
from lbzoo.recipe.finding import PACKAGE_RECIPES

NAME = "resnet50_novograd_8k"
TEXT = (PACKAGE_RECIPES / f"{NAME}.yaml").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_into_the_working_folder() -> None:
    cp(NAME, None)
    assert Path(f"{NAME}.yaml").read_text(encoding="utf-8") == TEXT


def test_the_copy_of_a_recipe_over_a_base_runs() -> None:
    cp(NAME, Path("mine.yaml"))
    assert load_recipe("mine.yaml").hash == load_recipe(NAME).hash


def test_into_a_folder() -> None:
    Path("mine").mkdir()
    cp(NAME, Path("mine"))
    assert Path("mine", f"{NAME}.yaml").is_file()


@pytest.mark.parametrize(
    ("dest", "message"),
    [
        ("there.yaml", "'there.yaml' exists already and is not overwritten"),
        ("link.yaml", "'link.yaml' exists already and is not overwritten"),
        ("mine", "a recipe's file ends in .yaml; did you mean 'mine.yaml'"),
        ("no/folder.yaml", "there is no folder 'no'"),
    ],
)
def test_what_is_refused(dest: str, message: str) -> None:
    Path("there.yaml").write_text("mine")
    Path("link.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(UsageError, match=message):
        cp(NAME, Path(dest))
    assert Path("there.yaml").read_text() == "mine"
    assert not Path("nowhere.yaml").exists()


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'resnet50_novograd_8k'"):
        cp("resnet50_novograd_8", None)
