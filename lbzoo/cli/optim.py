"""``lbzoo optim``: the optimizers of the zoo, and of anybody."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lbzoo.cli.optim_check import check

optim = typer.Typer(
    name="optim",
    help="List optimizers, show one, or check that one behaves.",
    no_args_is_help=True,
    add_completion=False,
)
optim.command(name="check")(check)


@optim.command(name="list")
def list_(
    pattern: Annotated[str, typer.Argument(help="A glob on the names, such as 'vr_*'.")] = "*",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the registered optimizers, as `lbzoo ls optimizers` does."""
    from lbzoo.cli.ls import Kind, ls

    ls(Kind.optimizers, pattern, json)


@optim.command()
def show(
    name: Annotated[str, typer.Argument(help="A registered name, timm:NAME, torch:CLASS or package.module:Class.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an optimizer is: its paper, what it keeps, and its options with their defaults."""
    import dataclasses

    from lbzoo.cli.printing import print_json, print_table
    from lbzoo.optim import get_optimizer_info, optimizer_options

    info = dataclasses.asdict(get_optimizer_info(name))
    options = optimizer_options(name)
    if json:
        info["defaults"] = {key: option.default for key, option in options.items() if key in info["defaults"]}
        print_json({**info, "options": {key: _type_name(option.annotation) for key, option in options.items()}})
        return
    typer.echo(f"{info['name']}\n  {info['description']}".replace("``", "`"))
    for label, text in _facts(info):
        typer.echo(f"  {label:<13}{text}")
    typer.echo("")
    rows = [
        [key, _type_name(option.annotation), str(info["defaults"].get(key, "required"))]
        for key, option in options.items()
    ]
    print_table(["option", "type", "default"], rows)


def _facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("paper", info["paper"]),
        ("equation", info["equation"]),
        ("also called", ", ".join(info["aliases"])),
        ("lr scaling", info["lr_scaling"] or ""),
        ("state", "" if info["state_per_param"] is None else f"{info['state_per_param']:g} x the parameters"),
        ("layer-wise", "a norm over each whole tensor goes into its step" if info["layerwise"] else ""),
        ("needs", "gradient statistics (attach_stats)" if info["needs_gradient_stats"] else ""),
    ]
    return [(label, text) for label, text in facts if text]


def _type_name(annotation: Any) -> str:
    if annotation is Any:
        return ""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
