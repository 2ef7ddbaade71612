"""A recipe broken at random is refused with a place and a reason, or it loads; nothing else ever comes out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml
from valid_recipe import Write

from lbzoo.recipe import RecipeError, load_recipe

WHOLE = """\
version: 1
seed: 3
task: {name: image_classification, model: resnetv2_50, model_args: {layers: [1, 1]}}
data: {name: digits, global_batch_size: 256, micro_batch_size: 32, image_size: 32}
optimizer: {name: novograd, lr: 0.01, betas: [0.9, 0.98], param_rules: [{match: ['*.bias'], weight_decay: 0.0}]}
schedule: {name: polynomial, power: 2.0, warmup_ratio: 0.1}
lr_scaling: {rule: sqrt, base_global_batch_size: 128}
epochs: 3
trainer: {engine: lightning, devices: 2, precision: bf16-mixed, validate_every: {steps: 5}}
callbacks: [trust_ratio, {name: progress}]
checkpoint: {every_steps: 5, keep_last: 2}
logging: {every: 5, loggers: [tensorboard]}
plugins: []
table: {id: novograd/3, row: {batch_size: 1024}}
hardware: {devices: 8, device: V100}
expect: {val/top1: 0.5}
stages:
  - {name: one, steps: 5}
  - {name: two, epochs: 1, optimizer: {name: adamw, lr: 0.1}, data: {global_batch_size: 64}}
mini: {epochs: 1, stages: {two: {steps: 2}}, data: {image_size: 16}}
"""
STRANGE: list[Any] = [
    None, True, 0, -1, 3, 2.5, 1e300, float("nan"), float("inf"), 10**30,
    "", "x", "lamb", ":", "a.b:C", "collections:", "\u2603", "\0", "x" * 5000, "/", "..",
    [], [[]], [None], {}, {"name": None}, {"name": []}, {"name": "lamb", "lr": "x"}, [{"name": 3}], [1, 2, 3],
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def mutate(document: dict[str, Any], rng: random.Random) -> None:
    """Drop, rename, retype or copy something."""
    path = rng.choice(places(document))
    parent: Any = document
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    kind = rng.choice(["drop", "rename", "retype", "retype", "copy"])
    if kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        word = list(key)
        word[rng.randrange(len(word))] = rng.choice("aeiou_.")
        parent["".join(word)] = parent.pop(key)
    elif kind == "copy":
        other = rng.choice(places(document))
        value: Any = document
        for part in other:
            value = value[part]
        parent[key] = yaml.safe_load(yaml.safe_dump(value))
    else:
        parent[key] = rng.choice(STRANGE)


def try_to_load(path: Any, scale: str, overrides: list[str]) -> str | None:
    try:
        load_recipe(path, overrides, scale)  # type: ignore[arg-type]
    except RecipeError as error:
        problems = error.problems
    else:
        return None
    assert problems
    for problem in problems:
        place = problem.origin
        assert place.text or (place.file is not None and place.line is not None), f"no place: {problem}"
        assert problem.message
    return "\n".join(map(str, problems))


def test_the_whole_recipe_loads(write: Write) -> None:
    path = write(WHOLE)
    assert [try_to_load(path, scale, []) for scale in ("paper", "mini", "smoke")] == [None] * 3


@pytest.mark.parametrize("seed", range(8))
def test_broken_documents(write: Write, seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    for _ in range(40):
        document = yaml.safe_load(WHOLE)
        for _ in range(rng.randint(1, 3)):
            mutate(document, rng)
        path = write(yaml.safe_dump(document, sort_keys=False))
        refused += any(try_to_load(path, scale, []) is not None for scale in ("paper", "mini", "smoke"))
    assert refused > 20, "most of what was broken is noticed"


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("key", ["base", "plugins", "stages", "mini", "callbacks", "optimizer", "version"])
def test_strange_values(write: Write, key: str, strange: Any) -> None:
    for value in (strange, [strange], {"name": strange}):
        path = write(yaml.safe_dump({**yaml.safe_load(WHOLE), key: value}, sort_keys=False))
        for scale in ("paper", "mini"):
            try_to_load(path, scale, [])


@pytest.mark.parametrize("seed", range(3))
def test_broken_text(write: Write, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        text = list(WHOLE)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choice(
                ["", "\t", ":", "{", "]", "\n", "*", "&a ", "'", "- ", "#", "\0"]
            )
        try_to_load(write("".join(text)), "paper", [])


@pytest.mark.parametrize("seed", range(3))
def test_broken_overrides(write: Write, seed: int) -> None:
    rng = random.Random(seed)
    path = write(WHOLE)
    paths = places(yaml.safe_load(WHOLE))
    for _ in range(60):
        keys = [str(key) for key in rng.choice(paths)]
        if rng.random() < 0.5:
            keys.append(rng.choice(["x", "0", "name", "lr", "-1", ""]))
        value = yaml.safe_dump(rng.choice(STRANGE), default_flow_style=True).removesuffix("\n...\n").strip()
        try_to_load(path, rng.choice(["paper", "mini", "smoke"]), [f"{'.'.join(keys)}={value}"])
