"""Every row of every table as a checked recipe, or the reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lbzoo import registry
from lbzoo.errors import UsageError
from lbzoo.recipe import ResolvedRecipe, load_recipe, to_yaml
from lbzoo.recipe.finding import PACKAGE_RECIPES
from lbzoo.recipe.layers import row_document
from lbzoo.recipe.schema import Scale
from lbzoo.tables.paper_tables import PaperRow
from lbzoo.tables.row_layers import row_layer
from lbzoo.tables.table_files import Needs, TableFile, rules_of, table_files


@dataclass(frozen=True)
class RowRecipe:
    """A row that can be run: a recipe of the zoo and the row's layer over it."""

    row: PaperRow
    name: str
    path: Path
    layer: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The name of the row's own recipe, and so of its run folder: ``lamb_5-02-1024``."""
        return f"{self.row.table.replace('/', '_')}-{self.row.slug}"

    def load(self, scale: Scale = "paper", overrides: Sequence[str] = ()) -> ResolvedRecipe:
        """The row's recipe, settled. Raises RecipeError with the row's name."""
        try:
            return load_recipe(self.path, overrides, scale, row=self.layer)
        except UsageError as error:
            raise UsageError(
                f"{self.row.table} row {self.row.number} ({self.row.label}) on {self.name}:\n{error}"
            ) from error

    def write(self, folder: Path, suffix: str = "") -> Path:
        """The row's recipe as a file of its own, for ``lbzoo fit`` at any scale and on any number of devices."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stem}{suffix}.yaml"
        head = f"# {self.row.table} row {self.row.number} ({self.row.label}): {self.name} with the row's values\n"
        beside = path.with_suffix(f".{os.getpid()}.tmp")  # the ranks of a launcher all write it, and read it at once
        beside.write_text(head + to_yaml(row_document(self.path, self.layer)), encoding="utf-8")
        beside.replace(path)
        return path


@dataclass(frozen=True)
class Unavailable:
    """A row that cannot be run: not yet (``not built``), or not ever (``not in the zoo``)."""

    row: PaperRow
    kind: Literal["not built", "not in the zoo"]
    reason: str
    notes: tuple[str, ...] = ()
    name: str | None = None
    """The recipe that is to run it."""


def recipe_of(row: PaperRow, files: Mapping[str, TableFile] | None = None) -> RowRecipe | Unavailable:
    """What runs a row. The recipe is not read yet: ``RowRecipe.load`` checks it."""
    file = (table_files() if files is None else files).get(row.table)
    if file is None:
        return Unavailable(row, "not built", f"no file in recipes/tables says how {row.table} is run")
    rules = rules_of(file, row)
    notes = tuple(dict.fromkeys(rule.note for rule in rules if rule.note))
    for rule in rules:
        if rule.absent is not None:
            return Unavailable(row, "not in the zoo", rule.absent, notes)
    name = next((rule.recipe for rule in reversed(rules) if rule.recipe), file.recipe)
    if name is None:
        return Unavailable(row, "not built", f"the file of {row.table} names no recipe for this row", notes)
    path = PACKAGE_RECIPES / f"{name}.yaml"
    missing = missing_parts([file.needs, *(rule.needs for rule in rules)])
    if not path.is_file():
        missing.append(f"recipe {name}")
    if missing:
        return Unavailable(row, "not built", f"not built yet: {'; '.join(missing)}", notes, name)
    return RowRecipe(row, name, path, row_layer(file, row), notes)


def missing_parts(needs: Sequence[Needs]) -> list[str]:
    """The components that are not registered, by kind: ``["tasks bert_pretraining, squad", "data wikibooks"]``."""
    missing = []
    for kind, known in (("tasks", registry.tasks), ("data", registry.data), ("models", registry.models)):
        wanted = dict.fromkeys(name for each in needs for name in getattr(each, kind))
        names = [name for name in wanted if name not in known]
        if names:
            missing.append(f"{kind if len(names) > 1 else kind.removesuffix('s')} {', '.join(names)}")
    return missing
