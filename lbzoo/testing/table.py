"""Who passes what: the page ``docs/optimizer_conformance.md``.

python -m lbzoo.testing.table > docs/optimizer_conformance.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from typing import Any

from lbzoo import registry
from lbzoo.errors import LbzooError
from lbzoo.testing.check import CheckResult
from lbzoo.testing.kit import check_optimizer, list_checks


@dataclass(frozen=True)
class Entrant:
    """An optimizer of the page, with the options that it is checked with."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


WRAPPED = ("larc_lamb", "larc_novograd", "vr_lamb", "vr_lars", "vr_novograd")  # around torch's own: their faults too
PEERS = (
    Entrant("torch:SGD", {"momentum": 0.9}),
    Entrant("torch:AdamW"),
    Entrant("torch:AdamW", {"foreach": True}),
    Entrant("torch:AdamW", {"fused": True}),
    Entrant("torch:NAdam"),
    Entrant("torch:Adagrad"),
    Entrant("torch:Adafactor"),
    Entrant("timm:lamb"),
    Entrant("timm:lamb", {"max_grad_norm": None}),
    Entrant("timm:lars", {"momentum": 0.9}),
    Entrant("timm:larc", {"momentum": 0.9}),
    Entrant("timm:novograd"),
    Entrant("timm:adamp"),
    Entrant("timm:adan"),
    Entrant("timm:lion"),
    Entrant("timm:madgrad"),
    Entrant("pytorch_optimizer:Lamb"),
    Entrant("pytorch_optimizer:LARS"),
    Entrant("pytorch_optimizer:NovoGrad"),
)


def page() -> Iterator[str]:
    """The lines of the page, as the optimizers are checked."""
    ours, natives = _zoo()
    yield "# Which optimizer passes which check"
    yield ""
    yield "Made by `python -m lbzoo.testing.table > docs/optimizer_conformance.md`, which runs the conformance kit with"
    yield f"its slow checks; {date.today().isoformat()}, {_versions()}."
    yield "On a CPU, learning rate 0.1, default options but for those named; `lbzoo optim check NAME` gives one row."
    yield "A check that does not apply is not counted: most optimizers publish no layer statistics, or have only one"
    yield "implementation. The wrappers `larc_` and `vr_` go around every name, and share what it has; a few are here."
    yield "`vr_` optimizers step on statistics that are made up."
    yield from _section("The zoo's layer-wise optimizers", ours)
    yield from _section("torch's optimizers under the zoo's names", natives)
    yield from _section("Peers", PEERS)
    yield ""
    yield "## The checks"
    yield ""
    for check in list_checks():
        yield f"- **{check.name}** ({check.topic}{', slow' if check.slow else ''}): {' '.join(check.why.split())}"


def _zoo() -> tuple[list[Entrant], list[Entrant]]:
    """(layer-wise optimizers, torch's own)."""
    ours, natives = [], []
    for name in registry.optimizers.names():
        entry = registry.optimizers.entry(name)
        if entry.module.endswith("torch_native"):
            natives.append(Entrant(name))
        elif not name.startswith(("larc_", "vr_")) or name in WRAPPED:
            ours.append(Entrant(name))
    return ours, natives


def _section(title: str, entrants: list[Entrant] | tuple[Entrant, ...]) -> Iterator[str]:
    yield ""
    yield f"## {title}"
    yield ""
    yield "| optimizer | passes | fails |"
    yield "|---|---|---|"
    details = []
    for entrant in entrants:
        try:
            results = check_optimizer(entrant.name, options=entrant.options, slow=True)
        except LbzooError as error:
            yield f"| `{entrant.label}` | | not checked: {error} |"
            continue
        failed = [result for result in results if result.status == "failed"]
        passed = sum(result.status == "passed" for result in results)
        names = ", ".join(result.name for result in failed)
        print(f"{entrant.label}: {passed} passed, {len(failed)} failed", file=sys.stderr)
        yield f"| `{entrant.label}` | {passed} of {passed + len(failed)} | {names} |"
        if failed:
            details.append((entrant, failed))
    for entrant, failed in details:
        yield from _reasons(entrant, failed)


def _reasons(entrant: Entrant, failed: list[CheckResult]) -> Iterator[str]:
    yield ""
    yield f"`{entrant.label}`:"
    yield ""
    for result in failed:
        reason = re.sub(r"^rank \d+: ", "", result.reason)  # whichever was first
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        yield f"- {result.name}: {reason}"


def _versions() -> str:
    found = []
    for package in ("torch", "timm", "pytorch_optimizer", "accelerate"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    for line in page():
        print(line)
