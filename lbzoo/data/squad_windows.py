"""Questions and paragraphs as sequences of tokens: a long paragraph in several windows that overlap.

A window is [CLS] question [SEP] part of the paragraph [SEP]. Windows begin ``doc_stride`` tokens apart. At evaluation a
token is the beginning of an answer only in the window where it has the most context, as in BERT's own run_squad.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbzoo.data.base import SampleKey
from lbzoo.data.squad_files import Question
from lbzoo.data.wordpiece import CLASSIFY, PAD, SEPARATE, Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AT_ONCE = 1000  # paragraphs that are tokenised together


@dataclass(frozen=True)
class WindowSizes:
    """Tokens: of a whole window, from one window's beginning to the next's, of a question at most."""

    seq_len: int = 384
    doc_stride: int = 128
    max_question: int = 64


class Window:
    """What a window's logits are turned into text with. Not a dataclass, which Lightning would copy to the device.

    ``places`` [tokens of the paragraph's part, 2]: where in the context each begins and ends; the first of them is
    token ``first`` of the window. ``may_begin``: which of them have their most context here.
    """

    __slots__ = ("first", "may_begin", "places", "question")

    def __init__(self, question: Question, first: int, places: NDArray[np.int32], may_begin: NDArray[np.bool_]) -> None:
        self.question, self.first, self.places, self.may_begin = question, first, places, may_begin


@dataclass(frozen=True)
class _Part:
    """Tokens ``begin`` to ``end`` of a question's paragraph."""

    question: int
    begin: int
    end: int


class Windows:
    """The windows of some questions, by SampleKey or int; indexed by several, a finished micro-batch.

    ``input_ids`` [N, L], ``token_type_ids`` [N, L] (1 in the paragraph), ``attention_mask`` [N, L] bool,
    ``start_positions`` and ``end_positions`` [N]: the answer's first and last token, 0 where it is not in the window.
    With ``keep_text`` also ``windows``: a list of N :class:`Window`.
    """

    def __init__(
        self, questions: Sequence[Question], vocabulary: Vocabulary, sizes: WindowSizes, *, keep_text: bool
    ) -> None:
        import numpy as np

        self.questions, self.vocabulary, self.sizes, self.keep_text = questions, vocabulary, sizes, keep_text
        contexts = list(dict.fromkeys(question.context for question in questions))
        self._paragraphs = dict(zip(contexts, _encode(vocabulary, contexts), strict=True))
        self._question_ids = [
            np.asarray(ids[: sizes.max_question], np.int32)
            for ids, _ in _encode(vocabulary, [question.text for question in questions])
        ]
        self._parts = [part for number in range(len(questions)) for part in self._parts_of(number)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        """A micro-batch of one."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> dict[str, Any]:
        import numpy as np
        import torch

        numbers = [key.index if isinstance(key, SampleKey) else key for key in keys]
        shape = (len(numbers), self.sizes.seq_len)
        tokens = np.full(shape, self.vocabulary[PAD], np.int64)
        types, attended = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        answers = np.zeros((len(numbers), 2), np.int64)
        for row, number in enumerate(numbers):
            part = self._parts[number]
            sequence, first = self._sequence(part)
            tokens[row, : len(sequence)] = sequence
            types[row, first : len(sequence)] = 1
            attended[row, : len(sequence)] = True
            answers[row] = self._answer(part, first)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(tokens),
            "token_type_ids": torch.from_numpy(types),
            "attention_mask": torch.from_numpy(attended),
            "start_positions": torch.from_numpy(answers[:, 0].copy()),
            "end_positions": torch.from_numpy(answers[:, 1].copy()),
        }
        return {**batch, "windows": [self._window(number) for number in numbers]} if self.keep_text else batch

    def _parts_of(self, number: int) -> Iterator[_Part]:
        count = len(self._tokens(number))
        room = self.sizes.seq_len - len(self._question_ids[number]) - 3
        begin = 0
        while True:
            end = min(begin + room, count)
            yield _Part(number, begin, end)
            if end == count:
                return
            begin += min(self.sizes.doc_stride, room)

    def _sequence(self, part: _Part) -> tuple[NDArray[np.int32], int]:
        """(the window's tokens, where the paragraph begins in them)."""
        import numpy as np

        question = self._question_ids[part.question]
        cls, sep = [self.vocabulary[CLASSIFY]], [self.vocabulary[SEPARATE]]
        context = self._tokens(part.question)[part.begin : part.end]
        return np.concatenate([cls, question, sep, context, sep]), len(question) + 2

    def _answer(self, part: _Part, first: int) -> tuple[int, int]:
        """The first and last token of the first answer in the window; (0, 0) where it is not wholly in it."""
        import numpy as np

        question = self.questions[part.question]
        text, begin = question.answers[0]
        end = begin + len(text)
        places = self._places(part.question)
        inside = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > begin))
        if not len(inside) or inside[0] < part.begin or inside[-1] >= part.end:
            return 0, 0
        return first + int(inside[0]) - part.begin, first + int(inside[-1]) - part.begin

    def _window(self, number: int) -> Window:
        part = self._parts[number]
        places = self._places(part.question)[part.begin : part.end]
        first = len(self._question_ids[part.question]) + 2
        return Window(self.questions[part.question], first, places, self._most_context_here(number))

    def _most_context_here(self, number: int) -> NDArray[np.bool_]:
        """Of each token of the part, whether no other window of the question shows more of what is around it."""
        import numpy as np

        part = self._parts[number]
        tokens = np.arange(part.begin, part.end)

        def context(of: _Part) -> NDArray[np.float64]:
            left, right = tokens - of.begin, of.end - 1 - tokens
            score = np.minimum(left, right) + 0.01 * (of.end - of.begin)
            return np.where((left >= 0) & (right >= 0), score, -1.0)

        own = context(part)
        best = np.ones(len(tokens), np.bool_)
        for step in (-1, 1):
            other = number + step
            while 0 <= other < len(self._parts) and self._parts[other].question == part.question:
                theirs = context(self._parts[other])
                best &= (theirs < own) if step < 0 else (theirs <= own)  # of equals the first one has it
                other += step
        return best

    def _tokens(self, question: int) -> NDArray[np.int32]:
        return self._paragraphs[self.questions[question].context][0]

    def _places(self, question: int) -> NDArray[np.int32]:
        return self._paragraphs[self.questions[question].context][1]


def _encode(vocabulary: Vocabulary, texts: list[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """(ids, places) of each text; of numpy, as Python's numbers would take ten times the memory."""
    import numpy as np

    encoded = []
    for begin in range(0, len(texts), _AT_ONCE):
        for encoding in vocabulary.encode(texts[begin : begin + _AT_ONCE]):
            places = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
            encoded.append((np.asarray(encoding.ids, np.int32), places))
    return encoded
