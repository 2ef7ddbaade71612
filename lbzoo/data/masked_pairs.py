"""Pairs of sentences with masked tokens, as micro-batches: what BERT is pretrained on.

Which tokens are masked is drawn anew in every epoch from (seed, sample, epoch), so that nothing has to be stored and a
resumed run sees the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lbzoo.data.base import SampleKey
from lbzoo.data.rng import stable_uniform
from lbzoo.data.wordpiece import MASK, PAD, Vocabulary
from lbzoo.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

IGNORED = -100  # the label of a place that is not predicted
_MASKING = 2  # sets these random numbers apart from the sampler's and from augmentation's


class PairRow(NamedTuple):
    """A stored pair: ``tokens`` [CLS] first [SEP] second [SEP], any integer type."""

    tokens: NDArray[np.integer]
    second_start: int
    is_random: bool


class PairRows(Protocol):
    """Stored pairs by number."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[PairRow]: ...


@dataclass(frozen=True)
class Masking:
    """BERT's masking: of the chosen tokens 80 % become [MASK], 10 % any token, and 10 % stay.

    ``fraction`` of a sequence's tokens is chosen, special ones excepted, at least one and at most ``max_predictions``.
    """

    fraction: float
    max_predictions: int
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, vocabulary: Vocabulary, seq_len: int, fraction: float, max_predictions: int | None) -> Masking:
        return cls(
            fraction,
            max_predictions or most_predictions(seq_len, fraction),
            vocabulary[MASK],
            len(vocabulary),
            vocabulary.special_ids,
        )

    def apply(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], keys: Sequence[SampleKey], seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask ``tokens`` [N, L] in place; returns (places, labels), each [N, max_predictions], places in order.

        Whatever else is in the micro-batch, a sample's masks are a function of (seed, index, epoch).
        """
        import numpy as np

        def uniform(what: int, places: NDArray[np.int64]) -> NDArray[np.float64]:
            indices = np.array([key.index for key in keys])[:, None]
            epochs = np.array([key.epoch for key in keys])[:, None]
            return stable_uniform(_MASKING, what, seed, indices, epochs, places)

        ordinary = ~np.isin(tokens, self.special_ids)
        counts = np.clip(np.rint(self.fraction * lengths), 1, self.max_predictions)
        counts = np.minimum(counts, ordinary.sum(axis=1)).astype(np.int64)
        draws = np.where(ordinary, uniform(0, np.arange(tokens.shape[1])), 2.0)
        chosen = np.argsort(draws, axis=1, kind="stable")[:, : self.max_predictions]
        unused = np.arange(self.max_predictions) >= counts[:, None]
        places = np.sort(np.where(unused, tokens.shape[1], chosen), axis=1)
        places[unused] = 0
        originals = np.take_along_axis(tokens, places, axis=1)
        fate, replacements = uniform(1, places), (self.vocab_size * uniform(2, places)).astype(np.int64)
        masked = np.select([unused | (fate >= 0.9), fate < 0.8], [originals, self.mask_id], replacements)
        rows = np.broadcast_to(np.arange(len(tokens))[:, None], places.shape)
        tokens[rows[~unused], places[~unused]] = masked[~unused]
        return places, np.where(unused, IGNORED, originals)


def most_predictions(seq_len: int, fraction: float) -> int:
    """Masked tokens of a full sequence: 20 of 128, 77 of 512."""
    return math.ceil(fraction * seq_len)


def check_masking(name: str, seq_len: int, fraction: float, max_predictions: int | None) -> None:
    """Raise UsageError for options of data set ``name`` that make no sense."""
    if seq_len < 8:
        raise UsageError(f"data {name}: seq_len must be at least 8, got {seq_len}")
    if not 0 < fraction < 1:
        raise UsageError(f"data {name}: masked_fraction must lie between 0 and 1, got {fraction}")
    if max_predictions is not None and not 1 <= max_predictions <= seq_len:
        raise UsageError(f"data {name}: max_predictions must lie between 1 and seq_len, got {max_predictions}")


class MaskedPairs:
    """Samples by SampleKey, or by int with the masks of epoch 0; indexed by several, a finished micro-batch.

    A micro-batch of N sequences of length L with P places for predictions:

    ``input_ids`` [N, L], ``token_type_ids`` [N, L] (1 in the second stretch), ``attention_mask`` [N, L] bool,
    ``masked_positions`` [N, P], ``masked_labels`` [N, P] (IGNORED beyond a sequence's masked tokens),
    ``next_sentence_label`` [N] (1: the second stretch is a random one). Shapes never change.
    """

    def __init__(self, rows: PairRows, masking: Masking, *, seq_len: int, pad_id: int, seed: int) -> None:
        self.rows, self.masking = rows, masking
        self.seq_len, self.pad_id, self.seed = seq_len, pad_id, seed

    @classmethod
    def of(
        cls,
        rows: PairRows,
        vocabulary: Vocabulary,
        *,
        seq_len: int,
        fraction: float,
        max_predictions: int | None,
        seed: int,
    ) -> MaskedPairs:
        masking = Masking.of(vocabulary, seq_len, fraction, max_predictions)
        return cls(rows, masking, seq_len=seq_len, pad_id=vocabulary[PAD], seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Tensor]:
        """A micro-batch of one."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> dict[str, Tensor]:
        import numpy as np
        import torch

        pairs = [key if isinstance(key, SampleKey) else SampleKey(key, 0) for key in keys]
        rows = self.rows.read([key.index for key in pairs])
        tokens = np.full((len(rows), self.seq_len), self.pad_id, np.int64)
        for own, pair in zip(tokens, rows, strict=True):
            own[: len(pair.tokens)] = pair.tokens
        lengths = np.array([len(pair.tokens) for pair in rows])
        second_starts = np.array([pair.second_start for pair in rows])
        places = np.arange(self.seq_len)
        attended = places < lengths[:, None]
        positions, labels = self.masking.apply(tokens, lengths, pairs, self.seed)
        return {
            "input_ids": torch.from_numpy(tokens),
            "token_type_ids": torch.from_numpy((attended & (places >= second_starts[:, None])).astype(np.int64)),
            "attention_mask": torch.from_numpy(attended),
            "masked_positions": torch.from_numpy(positions),
            "masked_labels": torch.from_numpy(labels),
            "next_sentence_label": torch.tensor([int(pair.is_random) for pair in rows]),
        }


class PairsInMemory:
    """Pairs that were just made."""

    def __init__(self, pairs: Sequence[PairRow]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, numbers: Sequence[int]) -> list[PairRow]:
        return [self._pairs[number] for number in numbers]
