"""``lbzoo prepare``: raw corpora into what the data sets read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lbzoo.data.token_shards import Manifest
    from lbzoo.prepare.jobs import Progress

prepare = typer.Typer(help="Make a raw corpus into what a data set reads.", no_args_is_help=True)


@prepare.callback()
def _group() -> None:
    """A group, though there is but one command in it."""


@prepare.command()
def bert(
    source: Annotated[Path, typer.Option("--input", help="A folder of .txt and .parquet files, or one file.")],
    out: Annotated[Path, typer.Option(help="The folder for the shards.")],
    vocab: Annotated[Path | None, typer.Option(help="A WordPiece vocabulary, one token a line.")] = None,
    train_vocab: Annotated[
        int | None,
        typer.Option(min=1, help="Without --vocab: make one of so many tokens; by default 30522."),
    ] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Tokens of a sequence; 128 and 512 by default.")] = None,
    cased: Annotated[bool, typer.Option("--cased", help="Keep upper case and accents.")] = False,
    validation: Annotated[float, typer.Option(help="The part of the documents that is for validation.")] = 0.005,
    seed: Annotated[int, typer.Option(help="Of pairs and of which documents are for validation.")] = 0,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one a core. They change no result.")] = None,
) -> None:
    """Make text into tokenised sentence pairs for BERT: the data set wikibooks.

    Documents are the blocks between blank lines of text files, and the rows of parquet files' column `text`. Stopped
    and started again it goes on where it was.

    Example: lbzoo prepare bert --input wiki/ --out prepared/ --vocab vocab.txt
    """
    from lbzoo.data.wordpiece import BERT_VOCABULARY
    from lbzoo.errors import UsageError
    from lbzoo.prepare.bert import BertText, prepare_bert

    if vocab is not None and train_vocab is not None:
        raise UsageError("give --vocab or --train-vocab, not both")
    text = BertText(
        source,
        out,
        vocab or train_vocab or BERT_VOCABULARY,
        seq_lens=tuple(seq_len or (128, 512)),
        lowercase=not cased,
        validation=validation,
        seed=seed,
    )
    try:
        with _Bars() as show:
            manifest = prepare_bert(text, processes=processes, progress=show)
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on from what is finished", err=True)
        raise
    _print_summary(manifest, out)


def _print_summary(manifest: Manifest, out: Path) -> None:
    from lbzoo.data.wordpiece import BERT_VOCABULARY

    typer.echo(f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, vocabulary of {manifest.vocab_size:,}")
    for seq_len, splits in manifest.shards.items():
        train, held_out = (sum(shard.rows for shard in splits[split]) for split in ("train", "val"))
        typer.echo(f"sequences of {seq_len}: {train:,} to train on, {held_out:,} for validation")
    for problem, count in manifest.skipped.items():
        typer.echo(f"skipped {count:,} documents: {problem}", err=True)
    for place in manifest.skipped_at:
        typer.echo(f"  {place}", err=True)
    typer.echo(f"use it:  export LBZOO_WIKIBOOKS={out}")
    if manifest.vocab_size != BERT_VOCABULARY:
        typer.echo(f"and give recipes data.vocab_size={manifest.vocab_size}")


class _Bars:
    """A progress bar for each pass on a terminal; elsewhere a line at its beginning and at its end."""

    def __enter__(self) -> Progress:
        if not sys.stderr.isatty():
            return self._line
        from rich.console import Console
        from rich.progress import Progress as Bars

        self._bars = Bars(console=Console(stderr=True))
        self._bars.start()
        return self._bar

    def __exit__(self, *exception: object) -> None:
        if hasattr(self, "_bars"):
            self._bars.stop()

    def _bar(self, what: str, done: int, total: int) -> None:
        tasks = {task.description: task.id for task in self._bars.tasks}
        task = tasks[what] if what in tasks else self._bars.add_task(what, total=total)
        self._bars.update(task, completed=done, total=total)

    def _line(self, what: str, done: int, total: int) -> None:
        if done in (0, total):
            typer.echo(f"{what}: {done} of {total}", err=True)
