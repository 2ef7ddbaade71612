"""From the logits of windows to the texts of answers: a question's n best, as BERT's run_squad.py finds them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lbzoo.data.squad_windows import Window


class Answer(NamedTuple):
    """A text out of the paragraph, and the logits of its first and last token. They sort by ``score``."""

    score: float
    text: str
    start_logit: float
    end_logit: float


class AnswerSearch(NamedTuple):
    """``n_best`` answers are kept, of at most ``max_tokens``; as many first and last tokens of a window are tried."""

    n_best: int
    max_tokens: int

    def in_window(
        self, window: Window, start_logits: NDArray[np.float32], end_logits: NDArray[np.float32]
    ) -> list[Answer]:
        """The best answers in a window whose tokens have these logits [L], the best first."""
        import numpy as np

        part = slice(window.first, window.first + len(window.places))
        starts = np.where(window.may_begin, start_logits[part], -np.inf)
        ends = end_logits[part]
        first, last = _largest(starts, self.n_best), _largest(ends, self.n_best)
        scores = starts[first][:, None] + ends[last][None, :]
        tokens = last[None, :] - first[:, None] + 1
        scores[(tokens < 1) | (tokens > self.max_tokens)] = -np.inf
        found = []
        for place in _largest(scores.ravel(), self.n_best):
            row, column = divmod(int(place), len(last))
            if np.isfinite(scores[row, column]):
                begin, end = window.places[first[row], 0], window.places[last[column], 1]
                text = window.question.context[begin:end]
                logits = float(starts[first[row]]), float(ends[last[column]])
                found.append(Answer(float(scores[row, column]), text, *logits))
        return found

    def best(self, answers: Iterable[Answer]) -> list[Answer]:
        """The best of all windows' answers, the best first, each text once."""
        by_text: dict[str, Answer] = {}
        for answer in sorted(answers, reverse=True):
            by_text.setdefault(answer.text, answer)
        return heapq.nlargest(self.n_best, by_text.values())


def probabilities(answers: Sequence[Answer]) -> list[float]:
    """A softmax over the scores of a question's answers."""
    if not answers:
        return []
    top = max(answer.score for answer in answers)
    weights = [math.exp(answer.score - top) for answer in answers]
    return [weight / sum(weights) for weight in weights]


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """The places of the largest values, in falling order; of equals the first."""
    import numpy as np

    order: NDArray[np.intp] = np.argsort(-values, kind="stable")[:count]
    return order
