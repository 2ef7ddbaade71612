"""recipes/tables/*.yaml: every table has one, and mistakes are told with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbzoo.errors import UsageError
from lbzoo.recipe import RecipeError
from lbzoo.tables.paper_tables import paper_table, table_ids
from lbzoo.tables.row_layers import row_layer
from lbzoo.tables.table_files import MiniSizes, TableFile, rules_of, table_files


def test_every_table_of_the_papers_has_a_file() -> None:
    assert set(table_ids()) <= set(table_files())


def read(folder: Path, text: str) -> dict[str, TableFile]:
    (folder / "some.yaml").write_text(text)
    return table_files(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: [lamb/33]", r"some.yaml:2: tables.0: no such table in the papers; did you mean 'lamb/3'"),
        ("figures: [lans/fig2]", r"some.yaml:2: figures.0: no such figure .* did you mean 'lans/fig1'"),
        ("tables: [lamb/5]\ncolumns: {batch: epochs}", r"some.yaml:3: columns.batch: .*did you mean 'batch_size'"),
        ("tables: [lamb/5]\nrecipes: a", r"some.yaml:3: recipes: "),
        ("tables: [lamb/5]\nrows:\n  - match: {lr_: 1}", r"some.yaml:4: rows.0.match.lr_: no such column"),
        ("tables: [lamb/5]\nrows:\n  - match: {batch_size: 500}", r"some.yaml:4: rows.0: no row holds these values"),
        ("tables: [lamb/5]\nmini: {micro_batch_size: 8, micro_batches: 8}", r"some.yaml:3: mini: .*not both"),
        ("tables: [lamb/5, lamb/5]", r"lamb/5 has a file already"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, f"version: 1\n{text}\n")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, "version: 1\ntables: [lamb/33]\nfigures: [lans/fig2]\n")
    assert len(caught.value.problems) == 2


TEXT = """\
version: 1
tables: [lamb/5]
recipe: resnet50_lamb
columns: {lr: [optimizer.lr, task.model_args.lr], epochs: null, lr_scaling: schedule.rule}
set: {task: {label_smoothing: 0.1}, epochs: 1}
mini: {batch_divisor: 64, micro_batches: 8, epochs_divisor: 9}
rows:
  - match: {batch_size: [512, 1024]}
    set: {task: {label_smoothing: 0.2, drop_rate: 0.5}}
  - match: {batch_size: 1024}
    set: {task: {label_smoothing: 0.3}, optimizer: {lr: 9.0}}
"""


def test_a_row_as_a_layer(tmp_path: Path) -> None:
    file = read(tmp_path, TEXT)["lamb/5"]
    row = paper_table("lamb/5").rows[1]
    assert [rule.set["task"]["label_smoothing"] for rule in rules_of(file, row)] == [0.2, 0.3]
    lr = row.settings["lr"]
    assert row_layer(file, row) == {
        "task": {"label_smoothing": 0.3, "drop_rate": 0.5, "model_args": {"lr": lr}},
        "epochs": 1,
        "optimizer": {"lr": lr},  # the row's own value over the rule's
        "data": {"global_batch_size": 1024},
        "schedule": {"warmup_epochs": 0.625, "rule": "square_root"},
        "table": {"id": "lamb/5", "row": {"batch_size": 1024}},
        "expect": {"val/top1": 0.7706, "val/top5": 0.9349},
        "mini": {"data": {"global_batch_size": 16, "micro_batch_size": 2}, "epochs": 10.0},
    }


def test_percent_becomes_a_fraction() -> None:
    layer = row_layer(table_files()["novograd/3"], paper_table("novograd/3").rows[0])
    assert layer["expect"] == pytest.approx({"val/top1": 0.7686, "val/top5": 0.9331})
    assert layer["optimizer"]["lr"] == 0.007, "the recommended rate, not the printed slip"


def test_a_divisor_that_does_not_divide(tmp_path: Path) -> None:
    file = read(tmp_path, TEXT)["lamb/5"].model_copy(update={"mini": MiniSizes(batch_divisor=1000)})
    with pytest.raises(UsageError, match="lamb/5 row 1: 1000 does not divide the batch of 512"):
        row_layer(file, paper_table("lamb/5").rows[0])


@pytest.mark.parametrize("table_id", [each for each in table_ids() if table_files()[each].mini.batch_divisor])
def test_mini_batch_sizes_keep_the_paper_s_ratios(table_id: str) -> None:
    file = table_files()[table_id]
    ratios: set[float] = set()
    for row in paper_table(table_id).rows:
        layer = row_layer(file, row)
        mini = layer.get("mini", {})
        pairs = [(layer, mini), *((layer["stages"][name], stage) for name, stage in mini.get("stages", {}).items())]
        sizes = [tuple(block.get("data", {}).get("global_batch_size") for block in pair) for pair in pairs]
        ratios |= {paper / small for paper, small in sizes if paper is not None and small is not None}
    assert len(ratios) == 1
