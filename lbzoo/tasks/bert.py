"""What the tasks on BERT share: a model of any size from its configuration, and transformers' folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lbzoo.data.extras import extra
from lbzoo.errors import CheckpointError, UsageError, did_you_mean
from lbzoo.tasks.base import Task

if TYPE_CHECKING:
    from transformers import BertConfig

Size = Literal["large", "base"]
SIZES: dict[Size, dict[str, int]] = {
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
_VOCABULARY_MULTIPLE = 8  # tensor cores take whole multiples: 30,522 tokens become 30,528
_MUST_AGREE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "type_vocab_size", "hidden_act",
)  # fmt: skip


class BertTask(Task):
    """A task on one of transformers' BERT models, built from its configuration with random weights.

    ``model_class`` is its name in transformers. ``size`` is one of the paper's; ``config`` sets any other field of
    ``BertConfig``, so that the model can have any size. ``vocab_size`` comes from the data and is rounded up to a
    multiple of 8. Attention is torch's ``scaled_dot_product_attention``.
    """

    model_class: ClassVar[str]
    fsdp_layers = ("BertLayer",)
    shared_weights = ("model.bert.embeddings.", "model.bert.encoder.")  # not every head has a pooler before it

    model: Any  # a BertPreTrainedModel, whose annotations do not say what is in it

    def __init__(self, *, size: Size, vocab_size: int, config: dict[str, Any] | None) -> None:
        super().__init__()
        with extra("text"):
            import transformers
        self.model = getattr(transformers, self.model_class)(bert_config(size, vocab_size, config or {}))

    def encode(self, batch: dict[str, Tensor]) -> Any:
        """The encoder's outputs: ``last_hidden_state`` [N, L, width], and ``pooler_output`` where the model has one.

        Raises UsageError for sequences that are longer than the model has positions.
        """
        length, positions = batch["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length > positions:  # else an index error, on a GPU one that names nothing
            raise UsageError(
                f"sequences of {length:,} tokens are too long for a model of {positions:,} positions; take a smaller "
                f"data.seq_len, or set task.config.max_position_embeddings={length} in every stage"
            )
        # A mask of four dimensions is taken as it is; of one with two transformers would read the values, on the CPU.
        mask = batch["attention_mask"][:, None, None, :]
        return self.model.bert(batch["input_ids"], token_type_ids=batch["token_type_ids"], attention_mask=mask)

    def load_transformers(self, folder: Path) -> tuple[list[str], list[str]]:
        """Take over the weights of a model that transformers saved, of this or another head on the same encoder.

        Returns (new here, left out): what the folder has not (a head), which stays as it was initialised, and what
        this model has not. Rows of the embedding that pad the vocabulary may differ in number. Raises CheckpointError
        for another encoder.
        """
        from transformers import AutoConfig

        try:
            theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {folder / 'config.json'}: {error}") from error
        self._refuse_another_encoder(folder, theirs)
        try:
            with _without_bars():
                loaded, report = type(self.model).from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
                )
        except Exception as error:  # safetensors has a class of its own for damage
            raise CheckpointError(f"cannot load the weights in {folder}: {error}") from error
        fresh = sorted(report["missing_keys"])
        if any(name.startswith(("bert.embeddings.", "bert.encoder.")) for name in fresh):
            raise CheckpointError(f"{folder} lacks weights of the encoder, the first is '{fresh[0]}'")
        if loaded.config.vocab_size != self.model.config.vocab_size:
            loaded.resize_token_embeddings(self.model.config.vocab_size, mean_resizing=False)
        own = self.model.state_dict()
        taken = {name: tensor for name, tensor in loaded.state_dict().items() if name in own and name not in fresh}
        self.model.load_state_dict({**own, **taken})
        return fresh, sorted(report["unexpected_keys"])

    def save_transformers(self, folder: Path) -> None:
        """Save the model so that transformers' ``from_pretrained`` reads it."""
        with _without_bars():
            self.model.save_pretrained(folder)

    def _refuse_another_encoder(self, folder: Path, theirs: Any) -> None:
        ours = self.model.config
        if theirs.model_type != ours.model_type:
            raise CheckpointError(f"{folder} holds a model of type '{theirs.model_type}', not '{ours.model_type}'")
        differing = [
            f"{key} is {getattr(theirs, key)} there and {getattr(ours, key)} here"
            for key in _MUST_AGREE
            if getattr(theirs, key) != getattr(ours, key)
        ]
        if _padded(theirs.vocab_size) != ours.vocab_size:
            differing.append(f"vocab_size is {theirs.vocab_size} there and {ours.vocab_size} here")
        if differing:
            raise CheckpointError(f"{folder} holds another model: {'; '.join(differing)}")


def bert_config(size: Size, vocab_size: int, changes: dict[str, Any]) -> BertConfig:
    """The configuration of a size, with ``changes``; raises UsageError for fields that there are not."""
    from transformers import BertConfig

    standard = BertConfig()
    for key in changes:
        if not hasattr(standard, key) or key.startswith("_") or key == "vocab_size":
            known = [name for name in vars(standard) if not name.startswith("_") and name != "vocab_size"]
            raise UsageError(f"task.config: BertConfig has no field '{key}' to set here{did_you_mean(key, known)}")
    fields: dict[str, Any] = {**SIZES[size], **changes}
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise UsageError(
            f"task.config: hidden_size {fields['hidden_size']} does not divide among "
            f"{fields['num_attention_heads']} num_attention_heads"
        )
    fields |= {"vocab_size": _padded(vocab_size), "attn_implementation": "sdpa"}
    return BertConfig(**fields)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars, and without its report of what fitted, which is ours to make."""
    from transformers.utils import logging as their_logging

    shown, level = their_logging.is_progress_bar_enabled(), their_logging.get_verbosity()
    their_logging.disable_progress_bar()
    their_logging.set_verbosity_error()
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if shown:
            their_logging.enable_progress_bar()


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
