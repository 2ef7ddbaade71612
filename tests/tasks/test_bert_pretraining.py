"""BERT's pretraining against transformers' own loss, over uneven micro-batches, and in transformers' folders."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from bert_sizes import TINY, gradients, pairs, part

from lbzoo.checkpoint import load_weights, resolve_checkpoint, validates_averages
from lbzoo.data.masked_pairs import IGNORED
from lbzoo.errors import CheckpointError, UsageError
from lbzoo.tasks.bert_pretraining import BertPretraining
from lbzoo.tasks.linear_regression import LinearRegression
from lbzoo.tasks.squad import SquadTask


@pytest.fixture
def task() -> BertPretraining:
    torch.manual_seed(0)
    return BertPretraining(vocab_size=61, config=TINY)


def test_the_loss_is_transformers_own(task: BertPretraining) -> None:
    """With every place through the head, and labels all over the sequence."""
    batch = pairs(6).__getitems__(range(6))
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row in range(6):
        used = batch["masked_labels"][row] != IGNORED
        labels[row, batch["masked_positions"][row][used]] = batch["masked_labels"][row][used]
    theirs = task.model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"].long(),
        token_type_ids=batch["token_type_ids"],
        labels=labels,
        next_sentence_label=batch["next_sentence_label"],
    ).loss
    ours = task.training_step(batch, 0)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    found = gradients(task)
    task.zero_grad()
    theirs.backward()
    torch.testing.assert_close(found, gradients(task))


def test_only_masked_places_go_through_the_head(task: BertPretraining) -> None:
    seen = []
    task.model.cls.predictions.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape))
    batch = pairs(6).__getitems__(range(6))
    task.training_step(batch, 0)
    assert seen == [(6, 4, 16)], "15 % of 24 tokens, rounded up"


def test_uneven_micro_batches_make_the_loss_of_one_batch(task: BertPretraining) -> None:
    batch = pairs(12).__getitems__(range(12))
    parts = [part(batch, begin, begin + 4) for begin in (0, 4, 8)]
    counts = [{kind: int(count) for kind, count in task.count_items(each).items()} for each in parts]
    assert len({count["masked_tokens"] for count in counts}) > 1, "the micro-batches have to differ"
    assert {count["pairs"] for count in counts} == {4}
    task.training_step(batch, 0).backward()
    whole = gradients(task)
    task.zero_grad()
    task.items_per_micro_batch = {kind: sum(count[kind] for count in counts) / 3 for kind in counts[0]}
    for each in parts:
        (task.training_step(each, 0) / 3).backward()
    torch.testing.assert_close(gradients(task), whole)


def test_metrics_over_uneven_batches(task: BertPretraining) -> None:
    batch = pairs(10).__getitems__(range(10))
    task.eval()
    logged: dict[str, torch.Tensor] = {}
    task.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        for begin, end in ((0, 7), (7, 10)):
            task.validation_step(part(batch, begin, end), 0)
        task.on_validation_epoch_end()
        mlm_logits, nsp_logits = task(batch)
    used = batch["masked_labels"] != IGNORED
    log_p = mlm_logits.double().log_softmax(dim=2).gather(2, batch["masked_labels"].clamp(min=0)[..., None])[..., 0]
    loss = -log_p[used].mean()
    right = (mlm_logits.argmax(dim=2) == batch["masked_labels"])[used].double().mean()
    nsp_right = (nsp_logits.argmax(dim=1) == batch["next_sentence_label"]).double().mean()
    expected = {"mlm_loss": loss, "mlm_perplexity": math.exp(loss), "mlm_accuracy": right, "nsp_accuracy": nsp_right}
    for name, value in expected.items():
        assert float(logged[f"val/{name}"]) == pytest.approx(float(value), rel=1e-5)
    assert float(logged["val/loss"]) == pytest.approx(float(logged["val/mlm_loss"] + logged["val/nsp_loss"]))


def test_padding_changes_nothing(task: BertPretraining) -> None:
    batch = pairs(8).__getitems__(range(8))
    task.eval()
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"], batch["input_ids"], 17)}
    for ours, theirs in zip(task(batch), task(changed), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sizes_and_mistakes() -> None:
    with torch.device("meta"):
        large = BertPretraining(vocab_size=30522)
        base = BertPretraining(vocab_size=30522, size="base")
    assert sum(p.numel() for p in large.parameters()) == 336_232_258
    assert base.model.config.hidden_size == 768
    assert large.model.config._attn_implementation == "sdpa"
    with pytest.raises(UsageError, match="no field 'hiden_size' to set here; did you mean 'hidden_size'"):
        BertPretraining(vocab_size=61, config={"hiden_size": 8})
    short = BertPretraining(vocab_size=61, config={**TINY, "max_position_embeddings": 23})
    with pytest.raises(UsageError, match=r"24 tokens are too long .* 23 positions; .*max_position_embeddings=24"):
        short(pairs(2).__getitems__(range(2)))
    with pytest.raises(UsageError, match="hidden_size 10 does not divide among 3 num_attention_heads"):
        BertPretraining(vocab_size=61, config={"hidden_size": 10, "num_attention_heads": 3})


# --- transformers' folders --------------------------------------------------------------------------------------------


def test_from_pretrained_reads_what_was_saved(task: BertPretraining, tmp_path: Path) -> None:
    from transformers import AutoModel, BertForPreTraining

    task.save_transformers(tmp_path)
    theirs = BertForPreTraining.from_pretrained(tmp_path)
    assert theirs.config.vocab_size == 64
    own = task.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.state_dict().items())
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.embeddings.word_embeddings.weight, own["bert.embeddings.word_embeddings.weight"])


def test_a_fresh_task_takes_the_weights_over(task: BertPretraining, tmp_path: Path) -> None:
    task.save_transformers(tmp_path)
    torch.manual_seed(1)
    fresh = BertPretraining(vocab_size=61, config=TINY)
    path = resolve_checkpoint(tmp_path)
    assert not validates_averages(path)
    load_weights(path, fresh)
    assert all(torch.equal(t, task.state_dict()[name]) for name, t in fresh.state_dict().items())
    assert fresh.model.cls.predictions.decoder.weight is fresh.model.bert.embeddings.word_embeddings.weight


def test_another_head_on_the_same_encoder(
    task: BertPretraining, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task.save_transformers(tmp_path)
    torch.manual_seed(1)
    squad = SquadTask(vocab_size=61, config=TINY)
    head = squad.model.qa_outputs.weight.clone()
    with caplog.at_level(logging.WARNING):
        load_weights(tmp_path, squad)
    assert torch.equal(squad.model.qa_outputs.weight, head)
    assert "2 weights are new here, the first is qa_outputs.bias" in caplog.text
    assert "weights are left out" in caplog.text
    for name, tensor in squad.model.bert.state_dict().items():
        assert torch.equal(tensor, task.model.bert.state_dict()[name])


def test_an_unpadded_vocabulary(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    theirs = BertForMaskedLM(BertConfig(vocab_size=61, **TINY))
    theirs.save_pretrained(tmp_path)
    task = BertPretraining(vocab_size=61, config=TINY)
    load_weights(tmp_path, task)
    own = task.model.bert.embeddings.word_embeddings.weight
    assert own.shape == (64, 16)
    assert torch.equal(own[:61], theirs.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("part", ["embeddings", "encoder"])
def test_weights_that_lack_a_part_of_the_encoder(part: str, task: BertPretraining, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    task.save_transformers(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith((f"bert.{part}.", "cls."))}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks weights of the encoder, the first is 'bert\.{part}"):
        load_weights(tmp_path, BertPretraining(vocab_size=61, config=TINY))


def test_another_encoder_is_refused(task: BertPretraining, tmp_path: Path) -> None:
    task.save_transformers(tmp_path)
    other = BertPretraining(vocab_size=100, config={**TINY, "hidden_size": 32, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 2 there and 3 here; hidden_size is 16 there"):
        load_weights(tmp_path, other)
    with pytest.raises(CheckpointError, match="a model of transformers', which LinearRegression cannot start from"):
        load_weights(tmp_path, LinearRegression(input_shape=(3,)))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot load the weights in"):
        load_weights(tmp_path, task)
