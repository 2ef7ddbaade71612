"""Recipes by path and by name, and the nearest name where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from valid_recipe import VALID, Write

from lbzoo.errors import UsageError
from lbzoo.recipe.finding import PACKAGE_RECIPES, find_recipe, list_recipes, summary

HEADLINE = "resnet50_novograd_32k"


def test_a_path_with_and_without_its_suffix(valid: Path) -> None:
    assert find_recipe("valid.yaml") == valid
    assert find_recipe("./valid").resolve() == valid.resolve()
    assert find_recipe(valid.resolve()) == valid.resolve()


def test_a_name_is_found_from_any_folder(write: Write) -> None:
    assert find_recipe(HEADLINE) == PACKAGE_RECIPES / f"{HEADLINE}.yaml"


def test_the_working_folders_recipes_come_first(write: Write) -> None:
    own = write(VALID, f"recipes/{HEADLINE}.yaml")
    assert find_recipe(HEADLINE) == own
    homes = {recipe.name: recipe.home for recipe in list_recipes()}
    assert homes[HEADLINE] == "./recipes"
    assert homes["resnet50_novograd_8k"] == "lbzoo"


def test_recipes_in_folders_have_names_with_the_folder(write: Write) -> None:
    path = write(VALID, "recipes/vision/lamb_3.yaml")
    assert find_recipe("vision/lamb_3") == path
    assert find_recipe("lamb_3") == path
    write(VALID, "recipes/more/lamb_3.yaml")
    with pytest.raises(UsageError, match="'lamb_3' names several recipes: more/lamb_3, vision/lamb_3"):
        find_recipe("lamb_3")


def test_files_of_tables_are_no_recipes(write: Write) -> None:
    write("version: 1\ntables: [lamb/3]\n", "recipes/tables/lamb_3.yaml")
    assert not [recipe for recipe in list_recipes() if "tables" in recipe.name]
    with pytest.raises(UsageError, match="no recipe named 'lamb_3'"):
        find_recipe("lamb_3")


def test_recipes_of_another_package(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("raise RuntimeError('imported')", "their_zoo/__init__.py")
    path = write(VALID, "their_zoo/theirs.yaml")
    folder = Path("their_zoo-1.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-zoo\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[lbzoo.recipes]\ntheirs = their_zoo\nlost = their_zoo\ngone = no_such\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    found = {recipe.name: recipe for recipe in list_recipes()}
    assert found["theirs"].home == "their-zoo"
    assert find_recipe("theirs").resolve() == path.resolve()
    assert "lost" not in found
    assert "gone" not in found


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("resnet50_novogard_32k", "no recipe named 'resnet50_novogard_32k'; did you mean 'resnet50_novograd_32k'?"),
        ("vallid.yaml", "no recipe file 'vallid.yaml'; did you mean 'valid.yaml'?"),
        ("valid.yml", "no recipe file 'valid.yml'; did you mean 'valid.yaml'?"),
        (
            "resnet50_novograd_32.yaml",
            "no recipe file 'resnet50_novograd_32.yaml'; did you mean the recipe 'resnet50_n",
        ),
        ("zzz.yaml", "no recipe file 'zzz.yaml'; `lbzoo ls` lists the recipes"),
        ("no/such/folder.yaml", "no recipe file 'no/such/folder.yaml'; `lbzoo ls` lists the recipes"),
        (".", "'.' is a folder, not a recipe file; it holds valid.yaml"),
        ("empty", "'empty' is a folder, not a recipe file, and there is no recipe in it"),
        ("", "'' is a folder, not a recipe file; it holds valid.yaml"),
    ],
)
def test_what_is_not_there(valid: Path, ref: str, message: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UsageError) as error:
        find_recipe(ref)
    assert str(error.value).startswith(message)


def test_summary_is_the_first_line_after_the_command(write: Write) -> None:
    assert summary(write("# lbzoo fit x.yaml      LAMB table 5: 76.66\n")) == "LAMB table 5: 76.66"
    assert summary(write("# my own recipe\n")) == "my own recipe"
    assert summary(write("# lbzoo fit x.yaml\n")) == ""
    assert summary(write("version: 1\n")) == ""
    assert summary(Path("none.yaml")) == ""
