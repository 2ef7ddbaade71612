"""Data to YAML that reads back as the same data.

PyYAML's own writer follows YAML 1.1: it leaves the text ``1e-2`` without quotes, which YAML 1.2 reads as a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lbzoo.recipe.reading import scalar


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(value), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else style)


_Dumper.add_representer(str, _text)


def to_yaml(data: Any, *, one_line: bool = False) -> str:
    """YAML 1.2 of mappings, lists and scalars; tuples become lists, whatever is no data its text."""
    text: str = yaml.dump(
        _plain(data),
        Dumper=_Dumper,
        default_flow_style=one_line or None,
        width=10**6 if one_line else 110,
        sort_keys=False,
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...") if one_line else text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
