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
    for path, value in _placed(file, row):
        _put(layer, path, value)
    layer["table"] = {"id": row.table, "row": dict(row.key)}
    expected = dict(_expected(file, row))
    if expected:
        layer["expect"] = expected
    mini = _mini(file.mini, row)
    if mini:
        _merge(layer, {"mini": mini})
    return layer


def place_of(file: TableFile, column: str) -> str | None:
    """The one key of a recipe that a column goes to; None where there is none, or more than one."""
    target = file.columns.get(column, _PLACES.get(column))
    return target if isinstance(target, str) else None


def logged_metric(file: TableFile, name: str) -> str | None:
    """The name that the engine logs a metric of the paper's under; None where nothing logs it."""
    return file.metrics.get(name, _LOGGED.get(name))


def _placed(file: TableFile, row: PaperRow) -> Iterator[tuple[str, Any]]:
    """(key of the recipe, value) for each column of the row that goes anywhere."""
    for column, target in {**_PLACES, **file.columns}.items():
        value = row.settings.get(column)
        if column == "lr":
            value = row.settings.get("lr_recommended", value)  # where the printed one is wrong
        if value is None or (column in _PLACES and isinstance(value, str)):
            continue
        if column == "optimizer":
            value = str(value).replace("-", "_")
        yield from _at_targets(row, column, target, value)


def _at_targets(row: PaperRow, column: str, target: Target, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, dict):
        parts = value if isinstance(value, Mapping) else dict.fromkeys(target, value)
        for part, path in target.items():
            if part in parts:
                yield path, parts[part]
    elif isinstance(value, Mapping):
        raise UsageError(f"{row.table} row {row.number}: {column} has parts, and its file one place for it")
    elif target is not None:
        for path in [target] if isinstance(target, str) else target:
            yield path, value


def _expected(file: TableFile, row: PaperRow) -> Iterator[tuple[str, float]]:
    """The paper's results under the engine's names and in its units, which are fractions."""
    for reported in row.reported:
        name = logged_metric(file, reported.metric.name)
        if name is not None and reported.value is not None:
            yield name, reported.value / reported.metric.of_a_fraction


def _mini(sizes: MiniSizes, row: PaperRow) -> dict[str, Any]:
    mini: dict[str, Any] = {}
    batch, epochs = row.settings.get("batch_size"), row.settings.get("epochs")
    if sizes.batch_divisor is not None and isinstance(batch, int):
        small, rest = divmod(batch, sizes.batch_divisor)
        if rest:
            raise UsageError(
                f"{row.table} row {row.number}: {sizes.batch_divisor} does not divide the batch of {batch}"
            )
        mini["data"] = {"global_batch_size": small}
        if sizes.micro_batches is not None:
            mini["data"]["micro_batch_size"] = max(small // sizes.micro_batches, 1)
        elif sizes.micro_batch_size is not None:
            mini["data"]["micro_batch_size"] = min(small, sizes.micro_batch_size)
    if sizes.epochs_divisor is not None and isinstance(epochs, int | float):
        mini["epochs"] = epochs / sizes.epochs_divisor
    return mini


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
