"""lbzoo prepare bert: what it makes, whatever the number of processes and however often it is stopped; bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lbzoo.cli import app
from lbzoo.data.base import SampleKey
from lbzoo.data.masked_pairs import IGNORED
from lbzoo.data.sampling import StreamSampler
from lbzoo.data.token_shards import TokenShards, read_manifest, rows_per_group
from lbzoo.data.wikibooks import WikiBooks
from lbzoo.data.wordpiece import train_vocabulary
from lbzoo.errors import DataError, LbzooError, UsageError
from lbzoo.prepare import documents
from lbzoo.prepare.bert import WORK, BertText, prepare_bert
from lbzoo.prepare.documents import Piece, find_corpus, read_documents, sentences

NOUNS = ("cat", "dog", "house", "river", "stone", "tree", "bird", "road")


def document(number: int) -> str:
    return "\n".join(
        f"The {NOUNS[(number + k) % 8]} number {number} is near the {NOUNS[(number * k) % 8]}. It has {k} friends."
        for k in range(8)
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 good documents in two text files and a parquet file, and three bad ones."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("\n\n".join(document(n) for n in range(30)), encoding="utf-8")
    block = "\n\n\n".join(document(n) for n in range(30, 50)).encode()
    (folder / "b.txt").write_bytes(block + b"\n\nfine so far\n\xff\xfe bad\n\n" + document(50).encode() + b"\n")
    rows = [document(n) for n in range(51, 60)] + [None, " \n "]
    pq.write_table(pa.table({"id": range(11), "text": rows}), folder / "c.parquet", row_group_size=4)
    (folder / "notes.md").write_text("no text of this corpus")
    return folder


@pytest.fixture(scope="module")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare_bert(wanted(texts, out), processes=1)
    return out


def wanted(texts: Path, out: Path, **changes: Any) -> BertText:
    sizes: dict[str, Any] = {"vocabulary": 120, "seq_lens": (32, 64), "validation": 0.1, "shard_bytes": 8000}
    return BertText(texts, out, **{**sizes, **changes})


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_made(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    assert manifest.documents == 60
    assert manifest.skipped == {"no UTF-8 text": 1, "no text": 1, "no words in it": 1}
    places = {place.partition(": ")[0].rpartition("/")[2] for place in manifest.skipped_at}
    line = 20 * 8 + 19 * 2 + 1 + 2  # the second line of a document after 20 of 8 lines with two empty ones between
    assert places == {f"b.txt:{line}", "c.parquet:10", "c.parquet:11"}
    assert set(manifest.shards) == {"32", "64"}
    assert len(manifest.shards["32"]["train"]) > 2
    assert not (prepared / WORK).exists()
    for splits in manifest.shards.values():
        for shards in splits.values():
            for shard in shards:
                assert pq.read_metadata(prepared / shard.file).num_rows == shard.rows


def test_the_same_with_more_processes(texts: Path, prepared: Path, tmp_path: Path) -> None:
    prepare_bert(wanted(texts, tmp_path / "out"), processes=2)
    assert content(tmp_path / "out") == content(prepared)
    prepare_bert(wanted(texts, tmp_path / "other", seed=1), processes=1)
    assert content(tmp_path / "other") != content(prepared)


@pytest.mark.parametrize("stop_after", ["tokenising", "making pairs"])
def test_goes_on_where_it_was_stopped(stop_after: str, texts: Path, prepared: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == stop_after and done == 2:
            raise Stopped

    out = tmp_path / "out"
    with pytest.raises(Stopped):
        prepare_bert(wanted(texts, out), processes=1, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    kept |= {path: path.stat().st_mtime_ns for path in out.rglob("piece-*.arrow")}
    with pytest.raises(DataError, match=r"holds no manifest.json \(it was not prepared to the end\)"):
        WikiBooks(root=str(out), vocab_size=120, seq_len=32).prepare()
    jobs: dict[str, int] = {}
    prepare_bert(wanted(texts, out), processes=1, progress=lambda what, done, total: jobs.update({what: total}))
    assert content(out) == content(prepared)
    assert kept
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items() if path.suffix == ".parquet")
    assert jobs[stop_after] < (3 if stop_after == "tokenising" else len(list(out.rglob("*.parquet"))))


def test_a_damaged_shard_is_made_again(texts: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_bert(wanted(texts, out), processes=1)
    broken = out / "32" / "train-00001.parquet"
    broken.write_bytes(broken.read_bytes()[:-10])
    source = WikiBooks(root=str(out), vocab_size=120, seq_len=32)
    with pytest.raises(DataError, match=r"train-00001.parquet has [\d,]+ bytes, not the [\d,]+"):
        source.prepare()
    prepare_bert(wanted(texts, out), processes=1)
    assert content(out) == content(prepared)
    called: list[str] = []
    prepare_bert(wanted(texts, out), processes=1, progress=lambda what, *_: called.append(what))
    assert not called, "nothing is left to do"


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_vocabulary_is_made_again(damage: str, texts: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    if damage == "changed":
        (out / "vocab.txt").write_text((out / "vocab.txt").read_text().replace("cat", "tac", 1))
    else:
        (out / "vocab.txt").unlink()
    with pytest.raises(DataError, match=r"vocab.txt(.|\n)*Run lbzoo prepare bert again with the same options"):
        WikiBooks(root=str(out), vocab_size=120, seq_len=32).prepare()
    prepare_bert(wanted(texts, out), processes=1)
    assert content(out) == content(prepared)


def test_a_full_disk(texts: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        with pytest.raises(LbzooError, match=r"out: .*No space left on device; what is finished stays"):
            prepare_bert(wanted(texts, out), processes=1)
    prepare_bert(wanted(texts, out), processes=1)
    assert content(out) == content(prepared)


def test_other_options_need_another_folder(texts: Path, prepared: Path) -> None:
    with pytest.raises(UsageError, match=r"was begun with something else: seed was 0 and is 7"):
        prepare_bert(wanted(texts, prepared, seed=7), processes=1)


def test_the_data_set(prepared: Path) -> None:
    source = WikiBooks(root=str(prepared), vocab_size=120, seq_len=32)
    assert source.facts().num_train == 3_300_000_000 // 32
    source.prepare()
    manifest = read_manifest(prepared)
    assert source.facts().num_train == sum(shard.rows for shard in manifest.shards["32"]["train"])
    samples = source.train_dataset(seed=5)
    every = [pair.tokens.tolist() for pair in samples.rows.read(range(len(samples)))]
    by_hand = [
        memoryview(row).cast("H").tolist()
        for shard in manifest.shards["32"]["train"]
        for row in pq.read_table(prepared / shard.file).column("tokens").to_pylist()
    ]
    assert every == by_hand
    assert len(source.val_dataset()) == manifest.shards["32"]["val"][0].rows
    text = " ".join(source.vocabulary.tokens[token] for token in every[0])
    assert text.startswith("[CLS] ")
    assert "[UNK]" not in text


def test_resumes_at_the_exact_sample(prepared: Path) -> None:
    source = WikiBooks(root=str(prepared), vocab_size=120, seq_len=32)
    source.prepare()
    samples = source.train_dataset(seed=5)
    sizes: dict[str, Any] = {"num_samples": len(samples), "global_batch_size": 32, "micro_batch_size": 8, "seed": 5}
    whole = list(StreamSampler(**sizes, steps=40, preshuffled=True))  # several epochs
    resumed = list(StreamSampler(**sizes, steps=40, start_step=33, preshuffled=True))
    assert resumed == whole[33 * 4 :]
    fresh = WikiBooks(root=str(prepared), vocab_size=120, seq_len=32).train_dataset(seed=5)
    first, again = samples.__getitems__(whole[33 * 4]), fresh.__getitems__(resumed[0])
    assert all((first[name] == again[name]).all() for name in first)


def test_memory_is_bounded(prepared: Path) -> None:
    shards = read_manifest(prepared).shards["32"]["train"]
    rows = TokenShards(prepared, shards, rows_per_group=rows_per_group(32), cache_bytes=1)
    whole = TokenShards(prepared, shards, rows_per_group=rows_per_group(32), cache_bytes=1 << 30)
    numbers = [len(rows) - 1, 0, len(rows) // 2, 0]
    found, same = rows.read(numbers), whole.read(numbers)
    assert [pair.tokens.tolist() for pair in found] == [pair.tokens.tolist() for pair in same]
    assert len(rows._groups) == 1
    assert len(whole._groups) == len({n // len(rows) for n in numbers}) or len(whole._groups) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 128}, r"holds sequences of 32 and 64 tokens, not of data.seq_len 128"),
        (
            {"seq_len": 32, "vocab_size": 30522},
            r"vocabulary of 120, but data.vocab_size is 30,522; set data.vocab_size",
        ),
    ],
)
def test_shards_of_another_length_or_vocabulary(options: dict[str, int], message: str, prepared: Path) -> None:
    with pytest.raises(DataError, match=message):
        WikiBooks(root=str(prepared), **{"vocab_size": 120, **options}).prepare()


def test_flipped_bits_are_found(texts: Path, prepared: Path, tmp_path: Path) -> None:
    """The size is still right; without checksums every fifth of them is just another token."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    path = out / "32" / "train-00000.parquet"
    sound = path.read_bytes()
    source = WikiBooks(root=str(out), vocab_size=120, seq_len=32)
    source.prepare()
    column = pq.read_metadata(path).row_group(0).column(0)
    end = column.data_page_offset + column.total_compressed_size
    for place in range(end - column.total_compressed_size // 2, end, 40):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with pytest.raises(
            DataError, match=r"cannot read row group 0 of .*train-00000.parquet: (.|\n)*prepare bert again"
        ):
            source.train_dataset()[0]
    path.unlink()
    prepare_bert(wanted(texts, out), processes=1)
    assert path.read_bytes() == sound


def test_files_that_were_mixed_up(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_bert(wanted(texts, out), processes=1)
    wrong = out / "32" / "train-00000.parquet"
    wrong.write_bytes((out / "64" / "train-00000.parquet").read_bytes())
    content = json.loads((out / "manifest.json").read_text())
    content["shards"]["32"]["train"][0]["bytes"] = wrong.stat().st_size
    (out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train-00000.parquet holds sequences of 64 tokens, not of 32"):
        WikiBooks(root=str(out), vocab_size=120, seq_len=32).prepare()
    (out / "vocab.txt").write_text((out / "vocab.txt").read_text().replace("cat", "tac", 1))
    with pytest.raises(DataError, match=r"vocab.txt was changed"):
        WikiBooks(root=str(out), vocab_size=120, seq_len=64).prepare()


def test_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LBZOO_WIKIBOOKS", raising=False)
    with pytest.raises(DataError, match=r"neither data.root nor LBZOO_WIKIBOOKS is set(.|\n)*lbzoo prepare bert"):
        WikiBooks().prepare()
    monkeypatch.setenv("LBZOO_WIKIBOOKS", str(tmp_path))
    with pytest.raises(DataError, match=r"holds no manifest.json\n"):
        WikiBooks().prepare()


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1000])
def test_every_document_is_in_one_piece(piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    wanted = [f"document {n}\nits second line" for n in range(20)]
    path = tmp_path / "a.txt"
    for between in ("\n\n", "\n\n\n\n", "\n  \n", "\r\n\r\n"):
        path.write_bytes(("\n\n" + between.join(wanted) + "\n").replace("\n", "\n").encode())
        found = [
            doc.text.strip().replace("\r", "") for piece in find_corpus(path).pieces for doc in read_documents(piece)
        ]
        assert found == wanted, (between, piece_bytes)


def test_parquet_that_is_no_text(tmp_path: Path) -> None:
    """Parquet's strings are UTF-8 by definition, but nobody checks when they are written."""
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    column = pa.concat_arrays([pa.array(["one", None]), bad, pa.array(["two"])])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (piece,) = find_corpus(tmp_path).pieces
    found = [(doc.text, doc.problem, doc.place().rpartition(":")[2]) for doc in read_documents(piece)]
    assert found == [("one", "", "1"), ("", "no text", "2"), ("", "no UTF-8 text", "3"), ("two", "", "4")]


def test_a_parquet_file_that_is_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [document(n) for n in range(50)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    (piece,) = find_corpus(path).pieces
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: "):
        list(read_documents(piece))


def test_places_count_lines_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\nthree\n\nfour\n\xff\n")
    first, second = Piece(path, 0, 9), Piece(path, 9, path.stat().st_size)
    assert [doc.place() for doc in read_documents(first)] == [f"{path}:1", f"{path}:4"]
    (bad,) = read_documents(second)
    assert (bad.place(), bad.problem) == (f"{path}:7", "no UTF-8 text")


def test_a_file_without_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 1000)
    path = tmp_path / "a.txt"
    for long in ("a line of text\n" * 100, "a single line " * 100 + "\n", "a line " * 200 + "\nand another\n"):
        path.write_text(f"short\n\n{long}\nshort again\n\n{long}")
        found = list(read_documents(Piece(path, 0, path.stat().st_size)))
        assert [doc.problem[:11] for doc in found] == ["", "longer than", "", "longer than"]
        last = 3 + long.count("\n") + 1 + 2
        assert [doc.place() for doc in found[1:]] == [f"{path}:3", f"{path}:{last - 2}", f"{path}:{last}"]


def test_sentences() -> None:
    assert sentences('One. Two went 3.5 miles! "Three?" (Four) five e.g. six.\nSeven') == [
        "One.",
        "Two went 3.5 miles!",
        '"Three?"',
        "(Four) five e.g. six.",
        "Seven",
    ]


def test_texts_that_cannot_be_used(tmp_path: Path, texts: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        find_corpus(tmp_path / "nowhere")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        find_corpus(tmp_path / "x")
    (tmp_path / "x" / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"only files that end in \.md"):
        find_corpus(tmp_path / "x")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x" / "a.parquet")
    with pytest.raises(DataError, match="has no column 'text'; it has body"):
        find_corpus(tmp_path / "x")
    (tmp_path / "x" / "a.parquet").write_bytes(b"PAR")
    with pytest.raises(DataError, match="is no parquet file"):
        find_corpus(tmp_path / "x")
    empty = tmp_path / "empty"
    (empty / ".hidden").mkdir(parents=True)
    (empty / ".hidden" / "a.txt").write_text("Of another program.")
    with pytest.raises(DataError, match="holds no files"):
        find_corpus(empty)
    (empty / "a.txt").touch()
    with pytest.raises(DataError, match=r"there is no text in .*: 1 files, all empty"):
        find_corpus(empty)
    (tmp_path / "one.txt").write_text("A single document.")
    with pytest.raises(DataError, match="pairs of sentences need two"):
        prepare_bert(BertText(tmp_path / "one.txt", tmp_path / "o", 60), processes=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"seed must lie between 0 and 2\^32 - 1, got -1"),
        ({"seq_lens": (128, 70_000)}, "at most 65,536 tokens, got 70,000"),
        ({"seq_lens": (4,)}, "from 8"),
        ({"validation": 0.0}, "between 0 and 1"),
        ({"vocabulary": 70_000}, "at most 65,536 tokens, got 70,000"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_bert(wanted(texts, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_the_shards_need_a_folder_of_their_own(texts: Path, tmp_path: Path) -> None:
    """Inside the text's they would be text themselves when the command is given again."""
    with pytest.raises(UsageError, match="lies in the folder of the text itself"):
        prepare_bert(wanted(texts, texts / "prepared"))
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="out is a file"):
        prepare_bert(wanted(texts, tmp_path / "out"))


def test_a_vocabulary_of_another_language(texts: Path, tmp_path: Path) -> None:
    train_vocabulary(["привет мир " * 10, "ещё раз"], 40).save(tmp_path / "vocab.txt")
    with pytest.raises(DataError, match=r"vocab.txt makes \[UNK\] of \d+ % of this text's tokens"):
        prepare_bert(wanted(texts, tmp_path / "out", vocabulary=tmp_path / "vocab.txt"), processes=1)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(texts: Path, tmp_path: Path) -> None:
    words = ["prepare", "bert", "--input", str(texts), "--out", str(tmp_path / "out"), "--processes", "1"]
    sizes = ["--seq-len", "32", "--validation", "0.1", "--train-vocab", "120"]
    done = CliRunner().invoke(app, [*words, *sizes])
    assert done.exit_code == 0, done.output
    assert "60 documents" in done.stdout
    assert "sequences of 32: " in done.stdout
    assert "skipped 1 documents: no UTF-8 text" in done.stderr
    assert "c.parquet:10: no text" in done.stderr
    source = WikiBooks(root=str(tmp_path / "out"), vocab_size=120, seq_len=32)
    source.prepare()
    batch = source.train_dataset(seed=1).__getitems__([SampleKey(0, 0), SampleKey(1, 0)])
    assert batch["input_ids"].shape == (2, 32)
    assert (batch["masked_labels"] != IGNORED).any()
    assert "give recipes data.vocab_size=120" in done.stdout
    refused = CliRunner().invoke(app, [*words, *sizes, "--vocab", "x"])
    assert isinstance(refused.exception, UsageError)
    assert "not both" in str(refused.exception)


def test_the_command_with_nothing_but_folders(texts: Path, tmp_path: Path) -> None:
    """A vocabulary is made of the text, as large as BERT's or as the text has words for."""
    done = CliRunner().invoke(app, ["prepare", "bert", "--input", str(texts), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, "60 short documents leave none of 0.5 % for validation"
    assert "take more text, or another part for validation" in str(done.exception)
    out = tmp_path / "other"
    done = CliRunner().invoke(app, ["prepare", "bert", "--input", str(texts), "--out", str(out), "--validation", "0.1"])
    assert done.exit_code == 0, done.output
    manifest = read_manifest(out)
    assert set(manifest.shards) == {"128", "512"}
    assert 100 < manifest.vocab_size < 1000
    for seq_len in (128, 512):
        WikiBooks(root=str(out), vocab_size=manifest.vocab_size, seq_len=seq_len).prepare()
