"""A row of a paper's table as a layer over a recipe: base < recipe < **row** < scale block < command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lbzoo.errors import UsageError
from lbzoo.tables.paper_tables import PaperRow
from lbzoo.tables.table_files import MiniSizes, TableFile, Target, rules_of

# Where columns go unless the table's file says otherwise; null and text (`epochs: same for all rows`) go nowhere.
_PLACES: Mapping[str, Target] = {
    "batch_size": "data.global_batch_size",
    "epochs": "epochs",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "l2_regularization": "task.l2_regularization",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_epochs": "schedule.warmup_epochs",
    "warmup_ratio": "schedule.warmup_ratio",
}
# The names that the engine logs the papers' metrics under.
_LOGGED: Mapping[str, str] = {"top1": "val/top1", "top5": "val/top5", "f1": "val/f1", "exact_match": "val/exact_match"}


def row_layer(file: TableFile, row: PaperRow) -> dict[str, Any]:
    """The row as part of a recipe, in the recipe's keys, with its own ``table``, ``expect`` and ``mini`` blocks."""
    layer: dict[str, Any] = {}
    for changes in (file.set, *(rule.set for rule in rules_of(file, row))):
        _merge(layer, changes)
    targets = _targets(file, row)
    for column, target in targets.items():
        for path, value in _placed(row, column, target):
            _put(layer, path, value)
    layer["table"] = {"id": row.table, "row": dict(row.key)}
    expected = dict(_expected(file, row))
    if expected:
        layer["expect"] = expected
    for path, value in _mini(file.mini, row, targets["batch_size"]):
        _put(layer, f"mini.{path}", value)
    return layer


def place_of(file: TableFile, column: str) -> str | None:
    """The one key of a recipe that a column goes to; None where there is none, or more than one."""
    target = file.columns.get(column, _PLACES.get(column))
    return target if isinstance(target, str) else None


def logged_metric(file: TableFile, name: str) -> str | None:
    """The name that the engine logs a metric of the paper's under; None where nothing logs it."""
    return file.metrics.get(name, _LOGGED.get(name))


def _targets(file: TableFile, row: PaperRow) -> dict[str, Target]:
    """Where each column of the row goes."""
    targets = {**_PLACES, **file.columns}
    for rule in rules_of(file, row):
        targets |= rule.columns
    return targets


def _placed(row: PaperRow, column: str, target: Target) -> Iterator[tuple[str, Any]]:
    """(key of the recipe, value) for a column, if it goes anywhere."""
    value = row.settings.get(column)
    if column == "lr":
        value = row.settings.get("lr_recommended", value)  # where the printed one is wrong
    if value is None or (column in _PLACES and isinstance(value, str)):
        return
    if column == "warmup_steps" and "warmup_ratio" in row.settings:
        return  # the same length, in steps that need not be whole
    if column == "optimizer":
        value = str(value).replace("-", "_")
    yield from _at_targets(row, column, target, value)


def _at_targets(row: PaperRow, column: str, target: Target, value: Any) -> Iterator[tuple[str, Any]]:
    if target is None:
        return
    if isinstance(target, dict):
        parts = value if isinstance(value, Mapping) else dict.fromkeys(target, value)
        yield from ((path, parts[part]) for part, path in target.items() if part in parts)
    elif isinstance(value, Mapping):
        raise UsageError(f"{row.table} row {row.number}: {column} has parts, and its file one place for it")
    else:
        yield from ((path, value) for path in ([target] if isinstance(target, str) else target))


def _expected(file: TableFile, row: PaperRow) -> Iterator[tuple[str, float]]:
    """The paper's results under the engine's names and in its units, which are fractions."""
    for reported in row.reported:
        name = logged_metric(file, reported.metric.name)
        if name is not None and reported.value is not None:
            yield name, reported.value / reported.metric.of_a_fraction


def _mini(sizes: MiniSizes, row: PaperRow, target: Target) -> Iterator[tuple[str, Any]]:
    """(key, value) of the mini block: the batch sizes of the row, or of its phases, divided."""
    for path, batch in _placed(row, "batch_size", target) if sizes.batch_divisor is not None else ():
        assert sizes.batch_divisor is not None
        small, rest = divmod(batch, sizes.batch_divisor)
        if rest:
            raise UsageError(
                f"{row.table} row {row.number}: {sizes.batch_divisor} does not divide the batch of {batch}"
            )
        yield path, small
        micro = path.replace("global_batch_size", "micro_batch_size")
        if sizes.micro_batches is not None:
            yield micro, max(small // sizes.micro_batches, 1)
        elif sizes.micro_batch_size is not None:
            yield micro, min(small, sizes.micro_batch_size)
    epochs = row.settings.get("epochs")
    if sizes.epochs_divisor is not None and isinstance(epochs, int | float):
        yield "epochs", epochs / sizes.epochs_divisor


def _put(layer: dict[str, Any], path: str, value: Any) -> None:
    *blocks, key = path.split(".")
    for block in blocks:
        layer = layer.setdefault(block, {})
    layer[key] = value


def _merge(layer: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """``changes`` over ``layer``, in place, block by block."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            below = layer.setdefault(key, {})
            if not isinstance(below, dict):
                below = layer[key] = {}
            _merge(below, value)
        else:
            layer[key] = value
