"""BERT's pretraining: masked language model and next-sentence prediction (arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lbzoo.data.masked_pairs import IGNORED
from lbzoo.precision import at_least_float32
from lbzoo.registry import register_task
from lbzoo.tasks.bert import BertTask
from lbzoo.tasks.pretraining_metrics import PretrainingMetrics


@register_task("bert_pretraining")
class BertPretraining(BertTask):
    """Pretrain BERT: masked tokens and next sentences, with transformers' BertForPreTraining of any size.

    A batch is a mapping as ``lbzoo.data.masked_pairs.MaskedPairs`` makes it. The loss is the mean over the global
    batch's masked tokens plus the mean over its pairs. Only masked places go through the head on the vocabulary.

    ``size`` is BERT's; ``config`` changes any field of transformers' ``BertConfig``. Weights start at random.
    """

    model_class = "BertForPreTraining"
    monitor = "val/mlm_loss"
    mode = "min"

    def __init__(
        self,
        *,
        vocab_size: int,
        size: Literal["large", "base"] = "large",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(size=size, vocab_size=vocab_size, config=config)
        self.metrics = PretrainingMetrics()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits at the masked places [N, P, vocabulary], and of (next, random) for the pairs [N, 2]."""
        encoded = self.encode(batch)
        hidden, places = encoded.last_hidden_state, batch["masked_positions"]
        at_places = torch.gather(hidden, 1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        heads = self.model.cls
        return heads.predictions(at_places), heads.seq_relationship(encoded.pooler_output)

    def count_items(self, batch: dict[str, Tensor]) -> dict[str, int | Tensor]:
        labels = batch["masked_labels"]
        return {"masked_tokens": (labels != IGNORED).sum(), "pairs": len(labels)}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        mlm_logits, nsp_logits = self(batch)
        mlm = _sum_of_cross_entropy(mlm_logits.flatten(0, 1), batch["masked_labels"].flatten())
        nsp = _sum_of_cross_entropy(nsp_logits, batch["next_sentence_label"])
        return self.mean_over_items(mlm, "masked_tokens", batch) + self.mean_over_items(nsp, "pairs", batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        mlm_logits, nsp_logits = self(batch)
        self.metrics.update(mlm_logits, batch["masked_labels"], nsp_logits, batch["next_sentence_label"])

    def on_validation_epoch_end(self) -> None:
        self.log_validation({name: value.float() for name, value in self.metrics.compute().items()})
        self.metrics.reset()


def _sum_of_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORED, reduction="sum")
