"""Extractive question answering with BERT: the answer is a stretch of the paragraph (arXiv 1810.04805, 4.2)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lbzoo.errors import UsageError
from lbzoo.ranks import has_other_ranks
from lbzoo.registry import register_task
from lbzoo.tasks.bert import BertTask
from lbzoo.tasks.squad_answers import Answer, AnswerSearch, probabilities
from lbzoo.tasks.squad_metrics import squad_scores


@register_task("squad")
class SquadTask(BertTask):
    """Answer SQuAD's questions with transformers' BertForQuestionAnswering: exact match and F1.

    A batch is a mapping as ``lbzoo.data.squad_windows.Windows`` makes it. The loss is the mean of the
    cross-entropies of the answer's first and last token. ``size`` is BERT's; ``config`` changes any field of
    transformers' ``BertConfig``.

    After a validation ``predictions`` has the answer to each question, ``n_best_predictions`` the ``n_best`` best ones,
    of at most ``max_answer_tokens`` tokens.
    """

    model_class = "BertForQuestionAnswering"
    monitor = "val/f1"
    mode = "max"

    def __init__(
        self,
        *,
        vocab_size: int,
        size: Literal["large", "base"] = "large",
        config: dict[str, Any] | None = None,
        n_best: int = 20,
        max_answer_tokens: int = 30,
    ) -> None:
        super().__init__(size=size, vocab_size=vocab_size, config=config)
        if n_best < 1 or max_answer_tokens < 1:
            raise UsageError(
                f"task squad: n_best and max_answer_tokens must be at least 1, got {n_best} and {max_answer_tokens}"
            )
        self.search = AnswerSearch(n_best, max_answer_tokens)
        self.predictions: dict[str, str] = {}
        self.n_best_predictions: dict[str, list[dict[str, Any]]] = {}
        self._found: dict[str, list[Answer]] = defaultdict(list)  # of the validation under way, on this rank
        self._right: dict[str, list[str]] = {}

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of the answer's first and last token, [N, L] each, in float32."""
        hidden = self.encode(batch).last_hidden_state
        start_logits, end_logits = self.model.qa_outputs(hidden).float().unbind(dim=2)
        return start_logits, end_logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        start_logits, end_logits = self(batch)
        start_loss = F.cross_entropy(start_logits, batch["start_positions"])
        return (start_loss + F.cross_entropy(end_logits, batch["end_positions"])) / 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        starts, ends = (logits.cpu().numpy() for logits in self(batch))
        for window, start_logits, end_logits in zip(batch["windows"], starts, ends, strict=True):
            question = window.question
            self._right[question.id] = question.answer_texts
            self._found[question.id] += self.search.in_window(window, start_logits, end_logits)

    def on_validation_epoch_end(self) -> None:
        found, right = self._of_all_ranks()
        best = {question: self.search.best(answers) for question, answers in found.items()}
        self.predictions = {question: answers[0].text if answers else "" for question, answers in best.items()}
        self.n_best_predictions = {question: _as_json(answers) for question, answers in best.items()}
        self.log_validation(squad_scores(self.predictions, right))
        self._found, self._right = defaultdict(list), {}

    def _of_all_ranks(self) -> tuple[dict[str, list[Answer]], dict[str, list[str]]]:
        """Windows of a question may have fallen to several ranks."""
        parts = [(dict(self._found), self._right)]
        if has_other_ranks():
            parts = parts * dist.get_world_size()
            dist.all_gather_object(parts, (dict(self._found), self._right))
        found: dict[str, list[Answer]] = defaultdict(list)
        right: dict[str, list[str]] = {}
        for of_rank, right_of_rank in parts:
            right |= right_of_rank
            for question, answers in of_rank.items():
                found[question] += answers
        return dict(found), right


def _as_json(answers: list[Answer]) -> list[dict[str, Any]]:
    return [
        {"text": a.text, "probability": p, "start_logit": a.start_logit, "end_logit": a.end_logit}
        for a, p in zip(answers, probabilities(answers), strict=True)
    ]
