"""A BERT small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbzoo.data.masked_pairs import MaskedPairs, PairRow, PairsInMemory
from lbzoo.data.rng import stable_rng
from lbzoo.data.wordpiece import SPECIAL_TOKENS, Vocabulary

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VOCABULARY = Vocabulary((*SPECIAL_TOKENS, *(f"w{number}" for number in range(5, 61))))  # 61, padded to 64


def pairs(count: int, seq_len: int = 24) -> MaskedPairs:
    """Pairs of different lengths, so that they have different numbers of masked tokens."""
    import numpy as np

    rows = []
    for number in range(count):
        rng = stable_rng(number)
        length = int(rng.randint(8, seq_len + 1))
        tokens = np.array([2, *rng.randint(5, 61, length - 2), 3])
        tokens[length // 2] = 3
        rows.append(PairRow(tokens, length // 2 + 1, bool(rng.randint(2))))
    rows_in_memory = PairsInMemory(rows)
    return MaskedPairs.of(rows_in_memory, VOCABULARY, seq_len=seq_len, fraction=0.15, max_predictions=None, seed=0)


def part(batch: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[begin:end] for name, tensor in batch.items()}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
