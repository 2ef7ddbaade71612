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
from lbzoo.data.wordpiece import HasVocabulary, Vocabulary
from lbzoo.registry import register_data

if TYPE_CHECKING:
    from numpy.random import RandomState

NUM_TRAIN, NUM_VAL = 4000, 400  # questions, each one window at the sizes below
_SEED = 0  # the same for every run, whatever its seed, so that runs can be compared
_FACTS = 3  # sentences of a paragraph
# What a fact is about, and the words of its answers, mostly such as the manual's vocabulary knows whole.
_PROPERTIES = {
    "type": ("object", "class", "string", "list", "integer", "sequence", "dictionary", "set"),
    "part": ("module", "function", "method", "statement", "package", "block", "expression", "body"),
    "order": ("first", "second", "third", "last", "next", "left", "right", "before"),
    "size": ("one", "two", "three", "ten", "zero", "10", "20", "100"),
    "result": ("true", "false", "none", "error", "exception", "yield", "return", "break"),
    "access": ("read", "write", "call", "import", "execute", "delete", "open", "close"),
}


@register_data("generated_squad")
class GeneratedSquad(HasVocabulary, DataSource):
    """Generated questions in SQuAD's form (synthetic, embedded): a few facts, and one of them asked for.

    The vocabulary is that of the data set ``python_manual``.
    """

    in_memory = True
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        vocab_size: int = VOCABULARY,
        seq_len: int = 96,
        doc_stride: int = 48,
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
    """A document in SQuAD v1.1's form: a paragraph of three facts and a question about one of them, again and again."""
    rng = stable_rng(seed)
    paragraphs = [_paragraph(rng, f"generated-{seed}-{number}") for number in range(num_questions)]
    return {"version": "generated", "data": [{"title": "Generated", "paragraphs": paragraphs}]}


def _paragraph(rng: RandomState, question_id: str) -> dict[str, Any]:
    properties = rng.choice(list(_PROPERTIES), _FACTS, replace=False)
    asked = properties[rng.randint(_FACTS)]
    context, answers = "", []
    for name in properties:
        answer = " and ".join(rng.choice(_PROPERTIES[name], rng.randint(1, 3), replace=False))
        context += f"The {name} is "
        if name == asked:
            answers = [{"text": answer, "answer_start": len(context)}]
        context += f"{answer}. "
    return {
        "context": context.rstrip(),
        "qas": [{"id": question_id, "question": f"What is the {asked}?", "answers": answers}],
    }
