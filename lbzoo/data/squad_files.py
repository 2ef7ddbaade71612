"""SQuAD v1.1's JSON: questions on paragraphs, each with answers that stand in the paragraph (arXiv 1606.05250)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbzoo.errors import DataError

log = logging.getLogger(__name__)

_SHOWN = 5  # skipped questions that are named in the log


class Question:
    """A question on a paragraph: ``answers`` are (text, place in ``context``). No dataclass: Lightning copies those."""

    __slots__ = ("answers", "context", "id", "text")

    def __init__(self, id: str, text: str, context: str, answers: tuple[tuple[str, int], ...]) -> None:
        self.id, self.text, self.context, self.answers = id, text, context, answers

    @property
    def answer_texts(self) -> list[str]:
        return [text for text, _ in self.answers]


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file; ``skipped`` says of each that was left out where it stands and why."""

    questions: list[Question]
    skipped: list[str]


def read_questions(path: Path, *, for_training: bool) -> QuestionFile:
    """Read a file of SQuAD's. Raises DataError for one that is no such file, naming what it lacks and where.

    Training needs an answer that stands in its paragraph where the file says it does: other questions are skipped, and
    named in the log by file and line. For evaluation the texts of the answers are enough.
    """
    text = _read(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 0)
        raise DataError(f"{path}:{line}: no JSON: {error}") from error
    questions, skipped = [], []
    for question in _questions(content, path):
        problem = _problem(question, for_training)
        if problem:
            skipped.append(f"{path}:{_line_of(text, question.id)}: question {question.id}: {problem}")
        else:
            questions.append(question)
    _say_skipped(path, skipped)
    if not questions:
        raise DataError(f"{path} holds no question with an answer" + (f"; {skipped[0]}" if skipped else ""))
    return QuestionFile(questions, skipped)


def parse_questions(content: Any) -> list[Question]:
    """The questions of a document in SQuAD's form that is known to be sound."""
    return list(_questions(content, Path("document")))


def _questions(content: Any, path: Path) -> Iterator[Question]:
    articles = _field(content, "data", list, path, "")
    for number, article in enumerate(articles):
        for place, paragraph in enumerate(_field(article, "paragraphs", list, path, f"data[{number}]")):
            at = f"data[{number}].paragraphs[{place}]"
            context = _field(paragraph, "context", str, path, at)
            for index, entry in enumerate(_field(paragraph, "qas", list, path, at)):
                yield _question(entry, context, path, f"{at}.qas[{index}]")


def _question(entry: Any, context: str, path: Path, at: str) -> Question:
    if isinstance(entry, Mapping) and entry.get("is_impossible"):
        raise DataError(f"{path}: {at} has no answer (is_impossible): this is SQuAD 2.0, the task is SQuAD 1.1")
    answers = tuple(
        (
            _field(answer, "text", str, path, f"{at}.answers[{index}]"),
            _field(answer, "answer_start", int, path, f"{at}.answers[{index}]"),
        )
        for index, answer in enumerate(_field(entry, "answers", list, path, at))
    )
    return Question(_field(entry, "id", str, path, at), _field(entry, "question", str, path, at), context, answers)


def _field(holder: Any, key: str, kind: type, path: Path, at: str) -> Any:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, kind):
        where = f"{at}.{key}" if at else key
        names = {list: "a list", str: "a text", int: "a whole number"}
        raise DataError(f"{path} is no file of SQuAD's: {where} should be {names[kind]}")
    return value


def _problem(question: Question, for_training: bool) -> str:
    if not question.answers:
        return "it has no answer"
    if not for_training:
        return ""
    text, start = question.answers[0]
    if not text.strip():
        return "its answer is empty"
    if start < 0 or question.context[start : start + len(text)] != text:
        return f"its answer '{text[:60]}' does not stand at {start} of its context"
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _line_of(text: str, question_id: str) -> int:
    """The line that a question's id stands in, from 1; official files have a single one."""
    place = text.find(json.dumps(question_id))
    return text.count("\n", 0, max(place, 0)) + 1


def _say_skipped(path: Path, skipped: list[str]) -> None:
    for problem in skipped[:_SHOWN]:
        log.warning("skipped: %s", problem)
    if len(skipped) > _SHOWN:
        log.warning("skipped %d questions of %s in all", len(skipped), path)
