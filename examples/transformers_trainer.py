"""LANS in transformers' Trainer, with a callback that logs trust ratios: python transformers_trainer.py

A small BERT with random weights learns to tell sorted sequences from others; no download, a few seconds on a CPU.
"""

import torch
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import lbzoo

STEPS = 40


class TrustRatios(TrainerCallback):
    """Logs the trust ratio of every layer, and their median, in the steps that the trainer logs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer  # the hooks are given the one that accelerate has wrapped
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.optimizer.track_layer_stats = (state.global_step + 1) % args.logging_steps == 0

    def on_step_end(self, args, state, control, **_):
        if self.optimizer.track_layer_stats:
            stats = self.optimizer.layer_stats()
            ratios = stats.values["trust_ratio"]
            layers = {f"trust_ratio/{name}": r for name, r in zip(stats.names, ratios.tolist(), strict=True)}
            self.trainer.log({"trust_ratio_median": ratios.median().item(), **layers})
            control.should_log = True  # which log() takes for done, the loss included


def sequences(count: int) -> TensorDataset:
    """Token sequences of length 8, half of them sorted."""
    tokens = torch.randint(2, 64, (count, 8))
    labels = torch.arange(count) % 2
    return TensorDataset(torch.where(labels[:, None] == 1, tokens.sort(1).values, tokens), labels)


def collate(items):
    tokens, labels = zip(*items, strict=True)
    return {"input_ids": torch.stack(tokens), "labels": torch.stack(labels)}


def main() -> list[dict]:
    """Train, and return what was logged."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=8, **size))
    rules = [{"match": ["*.bias", "*LayerNorm*"], "weight_decay": 0.0}]
    optimizer = lbzoo.create_optimizer(model, "lans", lr=0.05, weight_decay=0.01, param_rules=rules)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(done + 1, STEPS - done) / (STEPS / 2))
    arguments = TrainingArguments(
        output_dir="trainer_output",
        max_steps=STEPS,
        per_device_train_batch_size=256,
        max_grad_norm=0.0,  # LANS normalises each layer's gradient itself
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    callback = TrustRatios(optimizer)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sequences(4096),
        data_collator=collate,
        optimizers=(optimizer, scheduler),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    for entry in main():
        print({key: value for key, value in entry.items() if "/" not in key})
