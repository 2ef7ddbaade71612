"""``lbzoo optim check``: does an optimizer behave?"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lbzoo.errors import UsageError


def check(
    optimizer: Annotated[
        str, typer.Argument(help="A name in the zoo, timm:NAME, torch:CLASS, package.module:Class or ./file.py:Class.")
    ],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Options of the optimizer.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only the checks of these names or topics.")
    ] = None,
    slow: Annotated[bool, typer.Option("--slow", help="Also the checks that take more than seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check an optimizer, a row a check; exit code 1 if one fails: lbzoo optim check ./mine.py:Mine lr=0.01."""
    from lbzoo.testing import iterate_checks, list_checks

    given = parse_options(options or ())
    results = []
    for result in iterate_checks(optimizer, options=given, only=only, slow=slow):
        results.append(result)
        if not as_json:
            mark = {"passed": "ok", "failed": "FAILED", "skipped": "-"}[result.status]
            typer.echo(f"{mark:<7} {result.name:<36} {result.reason}".rstrip())
    failed = [result for result in results if result.status == "failed"]
    why = {check.name: check.why for check in list_checks()}
    if as_json:
        rows = [{**dataclasses.asdict(result), "why": why[result.name]} for result in results]
        typer.echo(json.dumps({"optimizer": optimizer, "options": given, "checks": rows}, indent=1))
        return 1 if failed else 0
    for result in failed:
        typer.echo(f"\n{result.name}: {result.reason}")
        typer.echo("  " + why[result.name].replace("\n", "\n  "))
    counts = Counter(result.status for result in results)
    seconds = sum(result.seconds for result in results)
    summary = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped") if counts[status])
    typer.echo(f"\n{optimizer}: {summary} in {seconds:.1f} s")
    return 1 if failed else 0


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """``["lr=1e-2", "betas=[0.9, 0.98]"]`` as options; raises UsageError for a word without ``=``."""
    from lbzoo.recipe.nodes import Origin
    from lbzoo.recipe.reading import read_value

    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise UsageError(f"'{word}': write an option as name=value")
        plain = read_value(value, Origin("override", (name,), text=word)).plain()
        options[name] = tuple(plain) if isinstance(plain, list) else plain
    return options
