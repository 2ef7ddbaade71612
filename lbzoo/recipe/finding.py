"""Recipes by path or by name: in ``./recipes``, among the package's, and in other packages' entry points."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lbzoo.errors import UsageError, did_you_mean, nearest_name
from lbzoo.recipe.nodes import display_path

SUFFIXES = (".yaml", ".yml")
ENTRY_POINT_GROUP = "lbzoo.recipes"
PACKAGE_RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_TABLES = "tables"  # the folder, beside the recipes, of files that say how a paper's table is run: no recipes


@dataclass(frozen=True)
class Found:
    """A recipe by name. ``home`` says whose it is: ``./recipes``, ``lbzoo`` or the name of another package."""

    name: str
    path: Path
    home: str


def list_recipes() -> list[Found]:
    """Every recipe that has a name; of two with the same name the first home wins: ./recipes, lbzoo, other packages."""
    found: dict[str, Found] = {}
    files: set[Path] = set()
    own, shipped = _in_folder(Path("recipes"), "./recipes", "**/*"), _in_folder(PACKAGE_RECIPES, "lbzoo", "**/*")
    for recipe in (*own, *shipped, *_entry_points()):
        if recipe.path.resolve() not in files:
            files.add(recipe.path.resolve())
            found.setdefault(recipe.name, recipe)
    return sorted(found.values(), key=lambda recipe: recipe.name)


def find_recipe(ref: str | Path, folder: Path | None = None) -> Path:
    """The file that ``ref`` names: a path, with or without its suffix, or a recipe's name.

    A relative path is taken from ``folder`` (default: the working directory).
    Raises UsageError with the nearest names where there is none.
    """
    text = str(ref)
    path = (folder or Path()) / text
    for candidate in (path, *(Path(f"{path}{suffix}") for suffix in SUFFIXES if path.name)):
        if is_file(candidate):
            return candidate
    recipes = list_recipes()
    matches = [recipe for recipe in recipes if recipe.name == text]
    matches = matches or [recipe for recipe in recipes if recipe.path.stem == text]
    if len(matches) == 1:
        return matches[0].path
    if matches:
        raise UsageError(f"'{text}' names several recipes: {', '.join(recipe.name for recipe in matches)}")
    if len(text) < 256 and path.is_dir():
        names = [recipe.path.name for recipe in _in_folder(path, text)]
        inside = f"; it holds {', '.join(names[:10])}" if names else ", and there is no recipe in it"
        raise UsageError(f"'{text}' is a folder, not a recipe file{inside}")
    if path.suffix in SUFFIXES or "/" in text or "\\" in text or isinstance(ref, Path):
        raise _no_such_file(path, text)
    raise UsageError(f"no recipe named '{text}'{did_you_mean(text, [recipe.name for recipe in recipes])}")


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too for what can be no path at all (too long, a null byte)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _no_such_file(path: Path, text: str) -> UsageError:
    siblings = {display_path(recipe.path): recipe.path.stem for recipe in _in_folder(path.parent, "")}
    near = nearest_name(path.stem, siblings.values())
    if near is not None:
        hint = "; did you mean '" + next(file for file, stem in siblings.items() if stem == near) + "'?"
    else:
        names = [recipe.name for recipe in list_recipes()]
        near = nearest_name(path.stem, names)
        hint = f"; did you mean the recipe '{near}'?" if near else "; `lbzoo ls` lists the recipes"
    return UsageError(f"no recipe file '{text}'{hint}")


def _in_folder(folder: Path, home: str, pattern: str = "*") -> Iterator[Found]:
    """The recipe files of a folder; only our own folders are searched in depth, others may hold a data set."""
    try:
        files = sorted(path for path in folder.glob(pattern) if path.suffix in SUFFIXES and path.is_file())
    except OSError:
        return
    for path in files:
        if path.relative_to(folder).parts[0] == _TABLES:
            continue
        yield Found(path.relative_to(folder).with_suffix("").as_posix(), path, home)


def _entry_points() -> Iterator[Found]:
    """Entry point ``name = package``: the file ``name.yaml`` in that package's folder. The package is not run."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            spec = importlib.util.find_spec(point.module)
        except ImportError:  # a parent package that does not import costs its own recipes, not the list
            continue
        folders = spec.submodule_search_locations if spec is not None else None
        for folder in folders or ():
            path = Path(folder) / f"{point.name}.yaml"
            if path.is_file():
                yield Found(point.name, path, point.dist.name if point.dist else point.module)
                break


def summary(path: Path) -> str:
    """What the first line of a recipe says after its command; read without parsing the file."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError):
        return ""
    if not first.startswith("#"):
        return ""
    command, _, said = first.lstrip("# ").strip().partition("  ")
    return said.strip() or ("" if command.startswith("lbzoo ") else command)
