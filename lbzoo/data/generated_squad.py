"""Generated questions in SQuAD's form, for runs of seconds: synthetic, and no measure of anything but working code."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import as_batch
from lbzoo.data.python_manual import VOCABULARY, manual_vocabulary
from lbzoo.data.rng import stable_rng
from lbzoo.data.squad import check_sizes
from lbzoo.data.squad_files import parse_questions
from lbzoo.data.squad_windows import Windows, WindowSizes
from lbzoo.data.wordpiece import Vocabulary
from lbzoo.registry import register_data

if TYPE_CHECKING:
    from numpy.random import RandomState

NUM_TRAIN, NUM_VAL = 4000, 400  # questions, each one window at the sizes below
_SEED = 0  # the same for every run, whatever its seed, so that runs can be compared
_FACTS = 4  # sentences of a paragraph
_SYLLABLES = (
    "an",
    "ba",
    "del",
    "er",
    "fo",
    "gin",
    "hal",
    "is",
    "ka",
    "lo",
    "mer",
    "no",
    "or",
    "pa",
    "ri",
    "ster",
    "tu",
)
# What is said, what is asked, and what kind of answer it has.
_RELATIONS = (
    ("The author of {module} is {answer}.", "Who is the author of {module}?", "name"),
    ("{module} was first released in {answer}.", "When was {module} released?", "year"),
    ("The default size of {module} is {answer} bytes.", "What is the default size of {module}?", "number"),
    ("{module} is a part of the package {answer}.", "Which package is {module} a part of?", "name"),
    ("When {module} fails, it raises {answer}.", "What does {module} raise when it fails?", "name"),
    ("The value returned by {module} has the type {answer}.", "What type has the value returned by {module}?", "name"),
    ("{module} is tested on {answer} machines.", "On how many machines is {module} tested?", "number"),
    ("The test for {module} was written by {answer}.", "Who wrote the test for {module}?", "name"),
)


@register_data("generated_squad")
class GeneratedSquad(DataSource):
    """Generated questions in SQuAD's form (synthetic, embedded): facts about modules that do not exist.

    The vocabulary is that of the data set ``python_manual``.
    """

    in_memory = True
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        vocab_size: int = VOCABULARY,
        seq_len: int = 128,
        doc_stride: int = 64,
        max_question: int = 32,
    ) -> None:
        check_sizes("generated_squad", seq_len, doc_stride, max_question)
        self.vocab_size = vocab_size
        self.sizes = WindowSizes(seq_len, doc_stride, max_question)
        self._counts = NUM_TRAIN, NUM_VAL

    def facts(self) -> DataFacts:
        return DataFacts(*self._counts, unit="windows", vocab_size=self.vocab_size)

    def prepare(self) -> None:
        """Nothing can be missing; only the windows are counted."""
        self._counts = len(self._splits[0]), len(self._splits[1])

    def train_dataset(self, *, seed: int = 0) -> Windows:
        return self._splits[0]

    def val_dataset(self) -> Windows:
        return self._splits[1]

    @property
    def vocabulary(self) -> Vocabulary:
        return manual_vocabulary(self.vocab_size)

    @cached_property
    def _splits(self) -> tuple[Windows, Windows]:
        train = parse_questions(generate(NUM_TRAIN, seed=_SEED))
        validation = parse_questions(generate(NUM_VAL, seed=_SEED + 1))
        return (
            Windows(train, self.vocabulary, self.sizes, keep_text=False),
            Windows(validation, self.vocabulary, self.sizes, keep_text=True),
        )


def generate(num_questions: int, *, seed: int) -> dict[str, Any]:
    """A document in SQuAD v1.1's form: a paragraph of four facts and a question about one of them, again and again."""
    rng = stable_rng(seed)
    paragraphs = [_paragraph(rng, f"generated-{seed}-{number}") for number in range(num_questions)]
    return {"version": "generated", "data": [{"title": "Modules", "paragraphs": paragraphs}]}


def _paragraph(rng: RandomState, question_id: str) -> dict[str, Any]:
    module = _word(rng).lower()
    asked = int(rng.randint(_FACTS))
    context, qas = "", []
    for number, relation in enumerate(rng.choice(len(_RELATIONS), _FACTS, replace=False)):
        said, question, kind = _RELATIONS[relation]
        answer = _answer(rng, kind)
        before, _, after = said.format(module=module, answer="|").partition("|")
        before = before[:1].upper() + before[1:]
        context += " " if context else ""
        if number == asked:
            found = [{"text": answer, "answer_start": len(context) + len(before)}]
            qas = [{"id": question_id, "question": question.format(module=module), "answers": found}]
        context += before + answer + after
    return {"context": context, "qas": qas}


def _answer(rng: RandomState, kind: str) -> str:
    if kind == "year":
        return str(rng.randint(1970, 2030))
    if kind == "number":
        return str(rng.randint(2, 1000))
    return " ".join(_word(rng) for _ in range(rng.randint(1, 3)))


def _word(rng: RandomState) -> str:
    return "".join(rng.choice(_SYLLABLES, rng.randint(2, 4))).capitalize()
