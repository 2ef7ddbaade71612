"""BERT's three stages as runs: what they leave behind, what goes out to transformers and comes in from there."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from fit_jobs import fit_here, saved_weights
from typer.testing import CliRunner

from lbzoo.cli import app
from lbzoo.data.generated_squad import GeneratedSquad
from lbzoo.data.python_manual import PythonManual
from lbzoo.data.wordpiece import saved_vocabulary
from lbzoo.engines import RunResult, fit
from lbzoo.errors import CheckpointError, DataError, UsageError
from lbzoo.tasks.squad import SquadTask


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return fit("bert_lans_96k", ["logging.loggers=[]"], scale="smoke", runs=tmp_path_factory.mktemp("runs"))


def test_predictions_lie_in_the_run_folder(smoke: RunResult) -> None:
    assert (smoke.state, smoke.step) == ("finished", 6)
    predictions = json.loads((smoke.run_dir / "predictions.json").read_text())
    questions = GeneratedSquad().val_dataset().questions
    assert set(predictions) == {question.id for question in questions}
    best = json.loads((smoke.run_dir / "nbest_predictions.json").read_text())
    for question in questions:
        assert predictions[question.id] in question.context
        first = best[question.id][0]
        assert first["text"] == predictions[question.id]
        assert sum(each["probability"] for each in best[question.id]) == pytest.approx(1)


def test_export_and_start_from_it(smoke: RunResult, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForQuestionAnswering

    folder = tmp_path / "exported"
    done = CliRunner().invoke(app, ["export", str(smoke.run_dir), str(folder), "--to", "transformers"])
    assert done.exit_code == 0, done.output
    theirs = BertForQuestionAnswering.from_pretrained(folder).eval()
    batch = GeneratedSquad().val_dataset().__getitems__([0, 1])
    with torch.no_grad():
        assert theirs(batch["input_ids"], attention_mask=batch["attention_mask"].long()).start_logits.isfinite().all()
    question = batch["windows"][0].question
    ids = AutoTokenizer.from_pretrained(folder)(question.text, question.context).input_ids
    assert ids == batch["input_ids"][0][batch["attention_mask"][0]].tolist()

    again = fit(
        "bert_lans_96k", ["stages=[{name: squad}]", "logging.loggers=[]", "optimizer.lr=0"], scale="smoke",
        init_from=folder, runs=tmp_path,
    )  # fmt: skip
    assert again.metrics["val/f1"] >= 0
    refused = CliRunner().invoke(app, ["export", str(smoke.run_dir), str(folder)])
    assert isinstance(refused.exception, UsageError)

    assert saved_vocabulary(folder) == GeneratedSquad().vocabulary
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"the"', '"teh"'))
    with pytest.raises(DataError, match="exported was trained with another vocabulary than stage 'squad' has"):
        fit("bert_lans_96k", ["stages=[{name: squad}]"], scale="smoke", init_from=folder, runs=tmp_path)


def test_fine_tuning_starts_from_a_run_of_pretraining(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the other way round, where the output embedding is the input's."""
    pretrained = fit("bert_lamb_mlperf", ["logging.loggers=[]"], scale="smoke", runs=tmp_path).run_dir
    words = ["stages=[{name: squad}]", "logging.loggers=[]", "stages.squad.optimizer.lr=0"]
    with caplog.at_level(logging.WARNING):
        tuned = fit("bert_lamb", words, scale="smoke", init_from=pretrained, runs=tmp_path).run_dir
    assert "2 weights are new here, the first is model.qa_outputs.bias" in caplog.text
    assert "weights are left out, the first is model.bert.pooler.dense.bias" in caplog.text
    before, after = saved_weights(pretrained), saved_weights(tuned)
    encoder = [name for name in before if name.startswith(SquadTask.shared_weights)]
    assert len(encoder) > 20
    assert all(torch.equal(before[name], after[name]) for name in encoder)

    still = ["logging.loggers=[]", "optimizer.lr=0"]
    back = fit("bert_lamb_mlperf", still, scale="smoke", init_from=tuned, runs=tmp_path).run_dir
    again = saved_weights(back)
    assert all(torch.equal(before[name], again[name]) for name in encoder)
    deeper = [*words, "task.config.num_hidden_layers=3"]
    with pytest.raises(CheckpointError, match=r"another model: .*encoder\.layer\.2\..* is missing"):
        fit("bert_lamb", deeper, scale="smoke", init_from=pretrained, runs=tmp_path)

    for state in (pretrained / "checkpoints").glob("step_*/state.json"):
        content = json.loads(state.read_text())
        assert content["vocabulary"] == PythonManual().vocabulary.digest
        state.write_text(json.dumps({**content, "vocabulary": "another"}))
    with pytest.raises(DataError, match="was trained with another vocabulary than stage 'squad' has"):
        fit("bert_lamb", words, scale="smoke", init_from=pretrained, runs=tmp_path)


def test_stages_of_different_vocabularies(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stage 'squad' .* weights of stage 'seq512'.*: 1,200 tokens against 1,000"):
        fit("bert_lamb", ["stages.squad.data.vocab_size=1000"], scale="smoke", runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [
        "trainer.strategy=ddp",
        pytest.param("trainer.strategy=fsdp trainer.activation_checkpointing=true", marks=pytest.mark.slow),
        "trainer.engine=accelerate trainer.strategy=fsdp",
    ],
)
def test_two_ranks_train_and_score_as_one(layout: str, smoke: RunResult, tmp_path: Path) -> None:
    """Masked tokens fall unevenly on the micro-batches, and answers are gathered from both ranks."""
    words = [*layout.split(), "trainer.accelerator=cpu", "logging.loggers=[]"]
    result = on_ranks(2, fit_here, "bert_lans_96k", words, tmp_path, "smoke")[0]
    assert result.metrics == pytest.approx(smoke.metrics, abs=1e-6)
    for ours, theirs in zip(logged(result), logged(smoke), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    names = ("predictions.json", "nbest_predictions.json")
    mine, others = ([json.loads((run.run_dir / name).read_text()) for name in names] for run in (result, smoke))
    assert mine[0] == others[0]
    assert mine[1].keys() == others[1].keys()


def logged(run: RunResult) -> list[dict[str, float]]:
    """What the lines of metrics.jsonl say of training and validation."""
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("train/", "val/"))} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bert_lans_96k", "bert_lamb"])
def test_mini_reaches_what_it_says(recipe: str, tmp_path: Path) -> None:
    result = fit(recipe, scale="mini", runs=tmp_path)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    pretrained = next(line for line in lines if line["step"] == 220)
    assert pretrained["val/mlm_loss"] < min(5.40, unigram_entropy())
    assert result.metrics["val/f1"] > 0.75
    assert result.metrics["val/exact_match"] > 0.75


def unigram_entropy() -> float:
    """In nats, of the manual's tokens: what a model gets that knows how often each stands there and no more."""
    source = PythonManual()
    from lbzoo.data.python_manual import manual_documents

    counts: dict[int, int] = {}
    for documents in manual_documents(source.vocab_size):
        for document in documents:
            for sentence in document:
                for token in sentence:
                    counts[token] = counts.get(token, 0) + 1
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())
