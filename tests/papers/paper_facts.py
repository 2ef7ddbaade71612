"""What the tests of the papers' data share: single rows, and the sizes that the papers' arithmetic rests on."""

from __future__ import annotations

import ast
import operator
from typing import Any

from lbzoo.papers import find_rows, load_paper

IMAGENET_TRAIN = 1_281_167
EVALUATION_IMAGES = 49_152  # LAMB evaluated on whole batches: its accuracies are multiples of 1/49152
BERT_SEQUENCES = 512_000_000  # that a BERT run of the LAMB paper sees in all, at any batch size
BERT_PHASE_1 = 0.9  # the part of them in the first phase

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def the_row(table: str, **columns: Any) -> dict[str, Any]:
    """The one row that holds these values."""
    rows = find_rows(table, columns)
    assert len(rows) == 1, f"{table} {columns}: {len(rows)} rows"
    return rows[0]


def figure(figure_id: str) -> dict[str, Any]:
    figures = load_paper(figure_id.partition("/")[0])["figures"]
    return next(each for each in figures if each["id"] == figure_id)


def value_of(expression: str) -> float:
    """An arithmetic expression as printed in a paper, with ^ for powers."""

    def walk(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant), expression
        assert isinstance(node.value, int | float), expression
        return node.value

    return walk(ast.parse(expression.replace("^", "**"), mode="eval").body)


def bert_steps(batch_size: int | dict[str, int]) -> float:
    """Optimizer steps of a BERT run, by its batch size or by those of its two phases."""
    if isinstance(batch_size, dict):
        first, second = batch_size["phase1"], batch_size["phase2"]
        return BERT_PHASE_1 * BERT_SEQUENCES / first + (1 - BERT_PHASE_1) * BERT_SEQUENCES / second
    return BERT_SEQUENCES / batch_size
