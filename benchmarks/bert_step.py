"""Sequences a second of BERT's pretraining, against a bare loop on transformers' own model in the same run.

    python benchmarks/bert_step.py                          # BERT-base at 128 tokens, on the GPU if there is one
    python benchmarks/bert_step.py --size large --seq-len 512 --micro-batch-size 22 --precision bf16
    python benchmarks/bert_step.py --size tiny --device cpu --threads 1 --dry-run

Three contestants train the same model on the same micro-batches with the same optimizer (torch's fused AdamW):

    bare                transformers' BertForPreTraining, all places through the head, its own loss
    lbzoo, all places   the task bert_pretraining with every place given as a masked one: the same work
    lbzoo               the task as it is, only masked places through the head

Then lbzoo's loader is asked for micro-batches, from parquet shards that were written for this, as fast as it can: what
a step would wait for it is its time a micro-batch less the step's, over the loader's processes. See ``timing.py`` for
how the steps are timed; the result is a dated file in ``results/``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from timing import Timing, compare, device_name, save_result

from lbzoo.data.loader import train_loader
from lbzoo.data.masked_pairs import IGNORED
from lbzoo.data.rng import stable_rng
from lbzoo.data.sentence_pairs import SentencePair
from lbzoo.data.token_shards import VOCABULARY_FILE, Manifest, ShardFile, rows_per_group, write_shard
from lbzoo.data.wikibooks import WikiBooks
from lbzoo.data.wordpiece import BERT_VOCABULARY, SPECIAL_TOKENS, Vocabulary
from lbzoo.engines.run_folder import environment
from lbzoo.tasks.bert_pretraining import BertPretraining

Batch = dict[str, Any]
BARE, SAME_WORK, GATHERED = "bare", "lbzoo, all places", "lbzoo"
# Contestant, measured against, sequences a second as a ratio.
TARGETS = ((SAME_WORK, BARE, 0.95), (GATHERED, BARE, 1.0))
MOST_WAITING = 0.02  # of a step
TINY = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
ROWS = 4096  # pairs that are written for the loader


@dataclass(frozen=True)
class Measured:
    """Seconds a step by contestant, and seconds a micro-batch that the loader takes with all its processes."""

    steps: dict[str, Timing]
    loading: float
    workers: int


def write_pairs(folder: Path, seq_len: int) -> WikiBooks:
    """Random pairs in the format of ``lbzoo prepare bert``, nine tenths of them full, with BERT's vocabulary size."""
    vocabulary = Vocabulary((*SPECIAL_TOKENS, *(f"token{n}" for n in range(len(SPECIAL_TOKENS), BERT_VOCABULARY))))
    vocabulary.save(folder / VOCABULARY_FILE)
    rng = stable_rng(0)
    pairs = []
    for _ in range(ROWS):
        length = seq_len if rng.random_sample() < 0.9 else int(rng.randint(8, seq_len))
        tokens = [2, *rng.randint(5, BERT_VOCABULARY, length - 3).tolist(), 3]
        tokens.insert(length // 2, 3)
        pairs.append(SentencePair(tokens, length // 2 + 1, bool(rng.randint(2))))
    shards = {}
    for split in ("train", "val"):
        file = f"{seq_len}/{split}-00000.parquet"
        write_shard(folder / file, pairs, seq_len=seq_len, vocab_sha256=vocabulary.digest)
        shards[split] = [ShardFile(file, len(pairs), (folder / file).stat().st_size)]
    per_group = {str(seq_len): rows_per_group(seq_len)}
    Manifest(len(vocabulary), vocabulary.digest, True, 0, per_group, {str(seq_len): shards}).save(folder)
    source = WikiBooks(root=str(folder), seq_len=seq_len)
    source.prepare()
    return source


def all_places(batch: Batch) -> Batch:
    """The micro-batch with every place of its sequences as one to be predicted; those that are not masked ignored."""
    places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    return {**batch, "masked_positions": places, "masked_labels": transformers_labels(batch)}


def transformers_labels(batch: Batch) -> torch.Tensor:
    labels = torch.full_like(batch["input_ids"], IGNORED)
    used = batch["masked_labels"] != IGNORED
    rows = torch.arange(len(used))[:, None].expand_as(used)
    labels[rows[used], batch["masked_positions"][used]] = batch["masked_labels"][used]
    return labels


def make_steps(batch: Batch, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """One training step of each contestant, every one with a model and an optimizer of its own."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32

    def arithmetic() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    def make(name: str) -> Callable[[], object]:
        torch.manual_seed(0)
        size = {"size": "base", "config": TINY} if arguments.size == "tiny" else {"size": arguments.size}
        task = BertPretraining(vocab_size=BERT_VOCABULARY, **size).to(device)
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
        given = all_places(batch) if name == SAME_WORK else batch
        labels = transformers_labels(batch).to(device)
        here = {key: tensor.to(device) for key, tensor in given.items()}
        mask = here["attention_mask"].long()

        def bare_loss() -> torch.Tensor:
            loss: torch.Tensor = task.model(
                here["input_ids"],
                attention_mask=mask,
                token_type_ids=here["token_type_ids"],
                labels=labels,
                next_sentence_label=here["next_sentence_label"],
            ).loss
            return loss

        def step() -> None:
            with arithmetic():
                loss = bare_loss() if name == BARE else task.training_step(here, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: make(name) for name in (BARE, SAME_WORK, GATHERED)}


def time_loader(source: WikiBooks, arguments: argparse.Namespace, micro_batches: int) -> float:
    """Seconds a micro-batch, once the loader's processes have begun."""
    size = arguments.micro_batch_size
    loader = train_loader(
        source,
        global_batch_size=size,
        micro_batch_size=size,
        steps=micro_batches + 4,
        seed=0,
        num_workers=arguments.workers,
    )
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - begin) / count


def measure(arguments: argparse.Namespace) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        source = write_pairs(Path(folder), arguments.seq_len)
        size = arguments.micro_batch_size
        batch = source.train_dataset(seed=0).__getitems__(list(range(size)))
        wait = torch.cuda.synchronize if arguments.device == "cuda" else (lambda: None)
        steps = compare(
            make_steps(batch, arguments),
            samples=arguments.samples,
            time_limit=arguments.time_limit,
            synchronize=wait,
            cpu_time=arguments.threads == 1 and arguments.device == "cpu",
        )
        loading = time_loader(source, arguments, micro_batches=min(200, ROWS // size - 4))
    return Measured(steps, loading, arguments.workers)


def report(measured: Measured, arguments: argparse.Namespace) -> str:
    size = arguments.micro_batch_size
    rates = {name: size / timing.median for name, timing in measured.steps.items()}
    lines = [
        f"# BERT-{arguments.size}, {arguments.seq_len} tokens, micro-batch {size}, {arguments.precision}, "
        f"{arguments.device}",
        "",
        f"{date.today().isoformat()}, {device_name(arguments.device)}, threads {torch.get_num_threads()}",
        "",
        "| | ms a step | samples | spread | sequences/s | against bare |",
        "|---|---|---|---|---|---|",
    ]
    for name, timing in measured.steps.items():
        ratio = rates[name] / rates[BARE]
        lines.append(
            f"| {name} | {1000 * timing.median:.1f} | {len(timing.seconds)} | {100 * timing.spread:.0f} % "
            f"| {rates[name]:,.2f} | {ratio:.2f} |"
        )
    lines.append("")
    for name, other, target in TARGETS:
        lines.append(f"{verdict(rates[name] / rates[other] >= target)}: {name} at least {target:g} x {other}")
    step = measured.steps[GATHERED].median
    waiting = max(measured.loading - step, 0.0) / step
    lines.append(
        f"{verdict(waiting < MOST_WAITING)}: waiting for data under {100 * MOST_WAITING:g} % of a step: "
        f"{1000 * measured.loading:.2f} ms a micro-batch from {measured.workers} loader processes, a step takes "
        f"{1000 * step:.1f} ms"
    )
    lines += ["", "```", json.dumps(environment()["packages"]), f"commit {environment()['commit']}", "```", ""]
    return "\n".join(lines)


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base", "large"), default="base")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None, help="default: bf16 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--time-limit", type=float, default=300.0)
    parser.add_argument("--dry-run", action="store_true", help="print, write no file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = report(measure(arguments), arguments)
    print(text)
    if not arguments.dry_run:
        save_result("bert_step", text, arguments.device)


if __name__ == "__main__":
    main()
