"""SQuAD v1.1 from its official files."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from lbzoo.data.base import DataFacts, DataSource
from lbzoo.data.in_memory import as_batch
from lbzoo.data.locations import data_folder, unusable
from lbzoo.data.squad_files import Question, read_questions
from lbzoo.data.squad_windows import Windows, WindowSizes
from lbzoo.data.token_shards import VOCABULARY_FILE
from lbzoo.data.wordpiece import BERT_VOCABULARY, HasVocabulary, Vocabulary, read_vocabulary, refuse_unknown
from lbzoo.errors import DataError, UsageError
from lbzoo.registry import register_data

ROOT_VARIABLE = "LBZOO_SQUAD"
TRAIN_FILE, DEV_FILE = "train-v1.1.json", "dev-v1.1.json"
NUM_TRAIN, NUM_VAL = 88_641, 10_833  # windows of 87,599 and 10,570 questions, with BERT's sizes and vocabulary
_SAMPLE = 200  # contexts whose words the vocabulary should know


@register_data("squad")
class Squad(HasVocabulary, DataSource):
    """SQuAD v1.1: questions on Wikipedia whose answers stand in the text, from the official JSON, in windows.

    ``root`` or $LBZOO_SQUAD is the folder with ``train-v1.1.json`` and ``dev-v1.1.json``. ``vocab`` is the vocabulary
    that the model was pretrained with (default: ``vocab.txt`` in that folder). A window holds ``seq_len`` tokens with
    the question, of which at most ``max_question`` are kept; windows of a paragraph begin ``doc_stride`` tokens apart.
    """

    in_memory = True  # text and tokens are; a window is a few copies
    collate = staticmethod(as_batch)

    def __init__(
        self,
        *,
        root: str | None = None,
        vocab: str | None = None,
        vocab_size: int = BERT_VOCABULARY,
        lowercase: bool = True,
        seq_len: int = 384,
        doc_stride: int = 128,
        max_question: int = 64,
    ) -> None:
        check_sizes("squad", seq_len, doc_stride, max_question)
        self.root, self.vocab, self.vocab_size, self.lowercase = root, vocab, vocab_size, lowercase
        self.sizes = WindowSizes(seq_len, doc_stride, max_question)
        self._counts = NUM_TRAIN, NUM_VAL

    def facts(self) -> DataFacts:
        return DataFacts(*self._counts, unit="windows", vocab_size=self.vocab_size)

    def prepare(self) -> None:
        missing = [f"{path} is missing" for path in self._files if not path.is_file()]
        if missing:
            raise unusable(f"SQuAD in {self._folder}", missing, _HOW_TO_GET_IT)
        if len(self.vocabulary) != self.vocab_size:
            raise DataError(
                f"the vocabulary {self._vocabulary_file} has {len(self.vocabulary):,} tokens, but data.vocab_size is "
                f"{self.vocab_size:,}; set data.vocab_size={len(self.vocabulary)} in every stage, or data.vocab=FILE"
            )
        contexts = [question.context for question in self._train.questions[:_SAMPLE]]
        refuse_unknown(self.vocabulary, contexts, str(self._vocabulary_file))
        self._counts = len(self._train), len(self._dev)

    def train_dataset(self, *, seed: int = 0) -> Windows:
        return self._train

    def val_dataset(self) -> Windows:
        return self._dev

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self._vocabulary_file, lowercase=self.lowercase)

    @cached_property
    def _train(self) -> Windows:
        questions = read_questions(self._files[0], for_training=True).questions
        return self._windows(questions, keep_text=False)

    @cached_property
    def _dev(self) -> Windows:
        questions = read_questions(self._files[1], for_training=False).questions
        return self._windows(questions, keep_text=True)

    def _windows(self, questions: list[Question], *, keep_text: bool) -> Windows:
        return Windows(questions, self.vocabulary, self.sizes, keep_text=keep_text)

    @property
    def _folder(self) -> Path:
        return data_folder(self.root, ROOT_VARIABLE, _HOW_TO_GET_IT)

    @property
    def _files(self) -> tuple[Path, ...]:
        return self._folder / TRAIN_FILE, self._folder / DEV_FILE, self._vocabulary_file

    @property
    def _vocabulary_file(self) -> Path:
        return Path(self.vocab).expanduser() if self.vocab else self._folder / VOCABULARY_FILE


def check_sizes(name: str, seq_len: int, doc_stride: int, max_question: int) -> None:
    """Raise UsageError where windows would have no room, or leave tokens out between them."""
    room = seq_len - max_question - 3
    if max_question < 1 or room < 1:
        raise UsageError(f"data {name}: a window of seq_len {seq_len} has no room beside {max_question} of a question")
    if not 1 <= doc_stride <= room:
        raise UsageError(
            f"data {name}: doc_stride must lie between 1 and {room} (seq_len {seq_len} less max_question "
            f"{max_question} and 3), got {doc_stride}"
        )


_HOW_TO_GET_IT = f"""\
Set data.root=FOLDER, or {ROOT_VARIABLE}=FOLDER in the environment, to a folder with {TRAIN_FILE} and
{DEV_FILE} (rajpurkar.github.io/SQuAD-explorer), and data.vocab=FILE to the vocabulary that the model was
pretrained with (or put it there as {VOCABULARY_FILE})."""
