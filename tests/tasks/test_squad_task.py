"""SQuAD: scores against hand-worked cases and torchmetrics, answers out of logits, windows of long paragraphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bert_sizes import TINY

from lbzoo.data.generated_squad import NUM_VAL, GeneratedSquad, generate
from lbzoo.data.squad import Squad
from lbzoo.data.squad_files import Question, parse_questions, read_questions
from lbzoo.data.squad_windows import Window, Windows, WindowSizes
from lbzoo.data.wordpiece import train_vocabulary
from lbzoo.errors import DataError, UsageError
from lbzoo.tasks.squad import SquadTask
from lbzoo.tasks.squad_answers import Answer, AnswerSearch, probabilities
from lbzoo.tasks.squad_metrics import exact_match, f1_score, normalized, squad_scores

# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("the Denver Broncos!", "Denver  Broncos", 1.0, 1.0),
        ("Denver", "Denver Broncos", 0.0, 2 / 3),  # precision 1, recall 1/2
        ("the cat sat on a mat", "a cat on the mat", 0.0, 6 / 7),  # 3 of 4 and 3 of 3
        ("cat cat", "cat", 0.0, 2 / 3),  # words count as often as they stand there
        ("dog", "cat", 0.0, 0.0),
        ("U.S.", "us", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),  # articles are words
        ("\u201cquoted\u201d", "quoted", 0.0, 0.0),  # only ASCII's punctuation is taken away
        ("an", "the", 1.0, 0.0),  # nothing is left of either: equal, but no word in common
    ],
)
def test_scores_by_hand(prediction: str, answer: str, exact: float, f1: float) -> None:
    assert exact_match(prediction, answer) == exact
    assert f1_score(prediction, answer) == pytest.approx(f1)


def test_the_order_of_normalisation() -> None:
    assert normalized(" The,  A.N. Other-one ") == "other one".replace(" ", "") or normalized("a-b") == "ab"
    assert normalized("A-N apple") == "apple"  # punctuation goes first, which makes an article


def test_the_best_answer_counts_and_missing_predictions_are_wrong() -> None:
    scores = squad_scores({"1": "red", "2": "blue"}, {"1": ["green", "red car"], "2": ["blue"], "3": ["x"]})
    assert scores == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((2 / 3 + 1 + 0) / 3)}


def test_equal_to_torchmetrics() -> None:
    from torchmetrics.text import SQuAD

    rng = np.random.RandomState(0)
    words = ["The", "cat", "a", "sat,", "on", "mat.", "Dog's", "1,000", "U.S.", "an"]
    # Texts of articles alone are worked by hand above: there torchmetrics goes by SQuAD 2.0's evaluation.
    texts = [" ".join(["Dog", *rng.choice(words, rng.randint(0, 6))]) for _ in range(400)]
    predictions = {str(n): texts[n] for n in range(100)}
    answers = {str(n): texts[100 + 3 * n : 103 + 3 * n] for n in range(100)}
    theirs = SQuAD()(
        [{"prediction_text": text, "id": key} for key, text in predictions.items()],
        [{"answers": {"answer_start": [0] * 3, "text": t}, "id": key} for key, t in answers.items()],
    )
    ours = squad_scores(predictions, answers)
    assert 100 * ours["exact_match"] == pytest.approx(float(theirs["exact_match"]))
    assert 100 * ours["f1"] == pytest.approx(float(theirs["f1"]), rel=1e-5)


# --- answers ----------------------------------------------------------------------------------------------------------


def window(tokens: int = 6, first: int = 3, may_begin: list[bool] | None = None) -> Window:
    """A window on 'aa bb cc ...', a word a token."""
    context = " ".join(2 * chr(ord("a") + n) for n in range(tokens))
    places = np.array([(3 * n, 3 * n + 2) for n in range(tokens)], np.int32)
    question = Question("q", "?", context, (("aa", 0),))
    return Window(question, first, places, np.array(may_begin or [True] * tokens))


def test_the_n_best_are_those_of_all_stretches() -> None:
    rng = np.random.RandomState(1)
    starts, ends = rng.randn(12).astype(np.float32), rng.randn(12).astype(np.float32)
    asked = window(may_begin=[True, True, False, True, True, True])
    found = AnswerSearch(n_best=4, max_tokens=3).in_window(asked, starts, ends)
    every = [
        (starts[3 + b] + ends[3 + e], asked.question.context[3 * b : 3 * e + 2])
        for b in range(6)
        for e in range(b, min(b + 3, 6))
        if b != 2
        and b in np.argsort(-np.where(asked.may_begin, starts[3:9], -99))[:4]
        and e in np.argsort(-ends[3:9])[:4]
    ]
    expected = sorted(every, reverse=True)[:4]
    assert [answer.text for answer in found] == [text for _, text in expected]
    assert [answer.score for answer in found] == pytest.approx([float(score) for score, _ in expected])


def test_the_best_of_several_windows() -> None:
    answers = [Answer(1.0, "x", 0.5, 0.5), Answer(3.0, "y", 2.0, 1.0), Answer(2.0, "x", 1.0, 1.0)]
    best = AnswerSearch(n_best=5, max_tokens=3).best(answers)
    assert [(answer.text, answer.score) for answer in best] == [("y", 3.0), ("x", 2.0)]
    assert probabilities(best) == pytest.approx([np.e / (1 + np.e), 1 / (1 + np.e)])


def test_no_stretch_is_short_enough() -> None:
    starts, ends = np.zeros(12, np.float32), np.zeros(12, np.float32)
    starts[8], ends[3] = 9, 9
    assert AnswerSearch(n_best=1, max_tokens=3).in_window(window(), starts, ends) == []


# --- windows ----------------------------------------------------------------------------------------------------------

WORDS = [f"word{n}" for n in range(100)]
LONG = " ".join(WORDS)


def windows(seq_len: int = 32, doc_stride: int = 8, answer: str = "word50 word51") -> Windows:
    vocabulary = train_vocabulary([LONG, "what is the third one"], 400)
    questions = [Question("long", "what is the third one", LONG, ((answer, LONG.index(answer)),))]
    return Windows(questions, vocabulary, WindowSizes(seq_len, doc_stride, 16), keep_text=True)


def test_windows_cover_the_paragraph_and_hold_the_answer() -> None:
    samples = windows()
    batch = samples.__getitems__(range(len(samples)))
    covered: set[int] = set()
    holding = 0
    for row, each in enumerate(batch["windows"]):
        tokens = batch["input_ids"][row][batch["attention_mask"][row]]
        assert len(tokens) <= 32
        assert batch["token_type_ids"][row].sum() == len(tokens) - each.first
        assert len(each.places) == len(tokens) - each.first - 1
        covered |= {int(place) for place in each.places[:, 0]}
        begin, end = int(batch["start_positions"][row]), int(batch["end_positions"][row])
        if begin:
            text = LONG[each.places[begin - each.first, 0] : each.places[end - each.first, 1]]
            assert text == "word50 word51"
            holding += 1
        else:
            assert end == 0
    assert 1 <= holding < len(samples)
    assert {LONG.index(word) for word in WORDS} <= covered


def test_each_token_begins_an_answer_in_one_window() -> None:
    samples = windows()
    batch = samples.__getitems__(range(len(samples)))
    begins = [
        int(p) for each in batch["windows"] for p, may in zip(each.places[:, 0], each.may_begin, strict=True) if may
    ]
    every = {int(place) for each in batch["windows"] for place in each.places[:, 0]}
    assert sorted(begins) == sorted(every)
    middle = batch["windows"][2]
    allowed = np.flatnonzero(middle.may_begin)
    assert allowed.min() > 0, "at its edge another window shows more"
    assert allowed.max() < len(middle.places) - 1


def test_a_perfect_model_scores_100() -> None:
    """Logits that mark the answers lead through search and text to exact match 1."""
    source = GeneratedSquad()
    source.prepare()
    samples = source.val_dataset()
    task = SquadTask(vocab_size=1200, config={**TINY, "max_position_embeddings": 128})
    logged: dict[str, float] = {}
    task.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]

    def mark(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        length = batch["input_ids"].shape[1]
        marks = [torch.nn.functional.one_hot(batch[f"{e}_positions"], length).float() for e in ("start", "end")]
        return marks[0], marks[1]

    task.forward = mark  # type: ignore[method-assign, assignment]
    for begin in range(0, len(samples), 64):
        task.validation_step(samples.__getitems__(range(begin, min(begin + 64, len(samples)))), 0)
    task.on_validation_epoch_end()
    assert logged == {"val/exact_match": 1.0, "val/f1": 1.0}
    assert len(task.predictions) == NUM_VAL
    assert len(next(iter(task.n_best_predictions.values()))) > 1


def test_the_loss_is_transformers_own() -> None:
    source = GeneratedSquad()
    batch = source.train_dataset().__getitems__([0, 1, 2])
    torch.manual_seed(0)
    task = SquadTask(vocab_size=1200, config={**TINY, "max_position_embeddings": 128})
    names = ("token_type_ids", "attention_mask", "start_positions", "end_positions")
    theirs = task.model(batch["input_ids"], **{name: batch[name].long() for name in names}).loss
    torch.testing.assert_close(task.training_step(batch, 0), theirs)


# --- files ------------------------------------------------------------------------------------------------------------


def test_generated_questions_are_sound() -> None:
    questions = parse_questions(generate(200, seed=0))
    assert len({question.id for question in questions}) == 200
    for question in questions:
        text, place = question.answers[0]
        assert question.context[place : place + len(text)] == text
    assert [q.text for q in parse_questions(generate(200, seed=0))] == [q.text for q in questions]
    assert GeneratedSquad().facts().num_val == NUM_VAL


def write(path: Path, *contexts: tuple[str, list[dict[str, Any]]]) -> Path:
    data = [{"title": "t", "paragraphs": [{"context": c, "qas": qas}]} for c, qas in contexts]
    path.write_text(json.dumps({"version": "1.1", "data": data}, indent=1))
    return path


def question(number: int, text: str, place: int) -> dict[str, Any]:
    return {"id": f"id{number}", "question": "What?", "answers": [{"text": text, "answer_start": place}]}


def test_answers_that_do_not_stand_in_their_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.json", ("red and blue", [question(1, "blue", 8), question(2, "green", 0)]))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if '"id2"' in text)
    found = read_questions(path, for_training=True)
    assert [q.id for q in found.questions] == ["id1"]
    assert found.skipped == [f"{path}:{line}: question id2: its answer 'green' does not stand at 0 of its context"]
    assert found.skipped[0] in caplog.text
    assert len(read_questions(path, for_training=False).questions) == 2, "texts are enough to evaluate"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a.json:1: no JSON"),
        ("[]", r"a.json is no file of SQuAD's: data should be a list"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\].context should be a text"),
        ('{"data": []}', r"a.json holds no question with an answer"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q", "answers": [], '
            '"is_impossible": true}]}]}]}',
            r"data\[0\].paragraphs\[0\].qas\[0\] has no answer \(is_impossible\): this is SQuAD 2.0",
        ),
    ],
)
def test_files_that_are_not_squads(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "a.json", for_training=True)


def test_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBZOO_SQUAD", str(tmp_path))
    with pytest.raises(DataError, match=r"train-v1.1.json is missing(.|\n)*dev-v1.1.json is missing"):
        Squad().prepare()
    context = "The red fox jumps over the blue dog"
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        write(tmp_path / name, (context, [question(1, "red fox", 4)]))
    train_vocabulary([context + " What?"] * 3, 70).save(tmp_path / "vocab.txt")
    size = len((tmp_path / "vocab.txt").read_text().splitlines())
    with pytest.raises(DataError, match=rf"has {size} tokens, but data.vocab_size is 30,522"):
        Squad().prepare()
    source = Squad(vocab_size=size, seq_len=64, doc_stride=16, max_question=16)
    source.prepare()
    assert (source.facts().num_train, source.facts().num_val) == (1, 1)
    assert "windows" in source.val_dataset()[0]
    assert "windows" not in source.train_dataset()[0]
    with pytest.raises(UsageError, match="doc_stride must lie between 1 and 45"):
        Squad(seq_len=64, doc_stride=60, max_question=16)
