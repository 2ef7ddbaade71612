"""Imports point one way (docs/architecture.md): read from the source, so that nothing has to be imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own rank and from lower ones... except that parts of one rank do not know each other.
RANKS = [
    {"errors", "precision", "ranks"},
    {"signatures"},
    {"registry", "sharding"},
    {"param_groups", "schedules", "scaling"},
    {"optim", "gsnr", "models", "data", "papers"},
    {"tasks", "callbacks"},
    {"recipe", "checkpoint"},
    {"engines"},
    {"tables", "report", "prepare", "testing"},
    {"cli"},
]
RANK_OF = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
TORCH_ONLY = {"precision", "ranks", "optim", "gsnr", "sharding", "param_groups"}
EXEMPT = {"__init__", "__main__"}  # lbzoo/__init__.py is lazy and names everything


def source_files() -> Iterator[tuple[str, Path]]:
    """(part, file) of everything in the package; callbacks/ is read once, through its real folder."""
    for path in sorted([*(ROOT / "lbzoo").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]):
        relative = path.relative_to(ROOT)
        parts = relative.parts[1:] if relative.parts[0] == "lbzoo" else relative.parts
        part = parts[0].removesuffix(".py")
        if part not in EXEMPT and relative.parts[:2] != ("lbzoo", "callbacks"):
            yield part, path


def imported_modules(path: Path, *, at_import_only: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of every import statement; with ``at_import_only`` those that run when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(_top_level(tree.body)) if at_import_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            # `from lbzoo import scaling` imports lbzoo.scaling.
            for alias in node.names:
                yield (f"lbzoo.{alias.name}" if node.module == "lbzoo" else node.module), node.lineno


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _top_level([*node.body, *node.orelse, *node.finalbody])
        else:
            yield node


FILES = list(source_files())


def test_every_part_has_a_place() -> None:
    unplaced = sorted({part for part, _ in FILES} - RANK_OF.keys())
    assert not unplaced, f"give these a rank in this test and in docs/architecture.md: {unplaced}"


@pytest.mark.parametrize(("part", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_imports_point_downwards(part: str, path: Path) -> None:
    for module, line in imported_modules(path):
        words = module.split(".")
        if words[0] != "lbzoo":
            continue
        assert len(words) > 1, f"{path}:{line}: imports from lbzoo/__init__.py, which nothing inside does"
        target = words[1]
        if target == "__version__" or target == part:
            continue
        assert target in RANK_OF, f"{path}:{line}: {module} is no part of the package"
        allowed = RANK_OF[target] < RANK_OF[part]
        assert allowed, f"{path}:{line}: {part} must not import {target}"


@pytest.mark.parametrize(("part", "path"), [f for f in FILES if f[0] in TORCH_ONLY], ids=lambda x: str(x)[-40:])
def test_optimizers_and_statistics_need_torch_alone(part: str, path: Path) -> None:
    third_party = {
        "lightning",
        "accelerate",
        "timm",
        "torchvision",
        "transformers",
        "pydantic",
        "yaml",
        "rich",
        "typer",
    }
    for module, line in imported_modules(path, at_import_only=True):
        assert module.split(".")[0] not in third_party, f"{path}:{line}: {module}"


def test_only_sharding_knows_dtensor() -> None:
    for part, path in FILES:
        if part in ("sharding", "testing"):
            continue
        for module, line in imported_modules(path):
            assert not module.startswith("torch.distributed.tensor"), (
                f"{path}:{line}: DTensor is sharding.py's business"
            )


def test_one_engine_a_file() -> None:
    for part, path in FILES:
        if part == "testing":
            continue  # the conformance kit checks accelerate's wrapping
        for module, line in imported_modules(path):
            if module.split(".")[0] == "accelerate":
                assert path.name == "accelerate.py", f"{path}:{line}: only engines/accelerate.py imports accelerate"


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    """The command line lists and checks in a second or two: none of these may come in with a module of these parts."""
    heavy = {"lightning", "timm", "torchvision", "torchaudio", "transformers", "torchrec", "sklearn", "accelerate"}
    light = {
        "errors",
        "signatures",
        "registry",
        "schedules",
        "scaling",
        "param_groups",
        "papers",
        "recipe",
        "cli",
        "data",
        "optim",
    }
    for part, path in FILES:
        if part not in light:
            continue
        for module, line in imported_modules(path, at_import_only=True):
            assert module.split(".")[0] not in heavy, (
                f"{path}:{line}: import {module} inside the function that needs it"
            )
