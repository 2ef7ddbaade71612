from __future__ import annotations

import random

import torch

from lbzoo.engines.seeding import micro_batch_seed, seed_micro_batch


def test_every_micro_batch_has_a_seed_of_its_own() -> None:
    seeds = {micro_batch_seed(s, t, j) for s in range(4) for t in range(100) for j in range(64)}
    assert len(seeds) == 4 * 100 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_seeds_are_unrelated() -> None:
    """Each of the 63 bits differs in about half of all neighbouring pairs."""
    pairs = [(micro_batch_seed(0, t, j), micro_batch_seed(0, t, j + 1)) for t in range(100) for j in range(40)]
    for bit in range(63):
        share = sum((a ^ b) >> bit & 1 for a, b in pairs) / len(pairs)
        assert 0.45 < share < 0.55, bit


def test_draws_depend_on_the_place_alone() -> None:
    def draw() -> tuple[torch.Tensor, float]:
        return torch.rand(3), random.random()

    seed_micro_batch(1, 2, 3)
    first = draw()
    draw()
    seed_micro_batch(1, 2, 3)
    again = draw()
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    seed_micro_batch(1, 2, 4)
    assert not torch.equal(draw()[0], first[0])
