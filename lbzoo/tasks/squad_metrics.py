"""Exact match and F1 as SQuAD v1.1's own evaluation defines them (arXiv 1606.05250, section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` as fractions, the mean over all questions of the best over a question's answers.

    A question without a prediction counts 0. ``answers`` holds the texts that are right, by question.
    """
    exact = _mean(_best(exact_match, predictions, question, texts) for question, texts in answers.items())
    f1 = _mean(_best(f1_score, predictions, question, texts) for question, texts in answers.items())
    return {"exact_match": exact, "f1": f1}


def exact_match(prediction: str, answer: str) -> float:
    """1 where the two are the same but for case, punctuation, articles and white space."""
    return float(normalized(prediction) == normalized(answer))


def f1_score(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over the words of the two, each counted as often as it stands there."""
    predicted, right = normalized(prediction).split(), normalized(answer).split()
    common = sum((Counter(predicted) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def normalized(text: str) -> str:
    """Lower case, without punctuation (ASCII), without articles, with single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(
    score: Callable[[str, str], float], predictions: Mapping[str, str], question: str, answers: Iterable[str]
) -> float:
    if question not in predictions:
        return 0.0
    return max((score(predictions[question], answer) for answer in answers), default=0.0)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
