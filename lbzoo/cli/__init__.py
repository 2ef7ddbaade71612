"""The ``lbzoo`` command: one file a verb, argument parsing and printing only.

Exit codes: 0 done, 1 failed, 2 recipe or usage, 3 diverged, 128 + n for a signal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata

import typer
from typer.exceptions import TyperException

from lbzoo.cli.check import check
from lbzoo.cli.cp import cp
from lbzoo.cli.doctor import doctor
from lbzoo.cli.export import export
from lbzoo.cli.fit import fit
from lbzoo.cli.ls import ls
from lbzoo.cli.optim import optim
from lbzoo.cli.plan import plan
from lbzoo.cli.prepare import prepare
from lbzoo.cli.schema import schema
from lbzoo.cli.show import show
from lbzoo.cli.sweep import sweep
from lbzoo.cli.table import table
from lbzoo.cli.validate import validate
from lbzoo.errors import DivergedError, LbzooError

app = typer.Typer(
    name="lbzoo",
    help="Large-batch training: recipes, layer-wise optimizers, trust ratios. Add --debug for tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (fit, validate, export, ls, show, cp, check, plan, table, sweep, schema, doctor):
    app.command()(verb)
app.add_typer(optim, name="optim")
app.add_typer(prepare, name="prepare")


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        typer.echo(f"lbzoo {metadata.version('lbzoo')}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. A user's mistake is one message and an exit code; anything else is a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = app([word for word in words if word != "--debug"], standalone_mode=False, prog_name="lbzoo")
    except TyperException as error:  # a mistake in the command line
        show = getattr(error, "show", None)
        show() if show else typer.echo(f"error: {error}", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # `lbzoo ls | head`
        _forget_stdout()
        code = 0
    except LbzooError as error:
        if debug:
            raise
        if not (isinstance(error, DivergedError) and os.environ.get("RANK", "0") != "0"):  # all ranks say the same
            typer.echo(f"error: {_first_cause(error)}", err=True)
        code = error.exit_code
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more, and leave with a code of its own
        _forget_stdout()
    raise SystemExit(code if isinstance(code, int) else 0)


def _forget_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _first_cause(error: LbzooError) -> str:
    """The message alone: an error of a data-loading process carries that process's traceback in front."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    rank = os.environ.get("RANK", "0")
    return text.strip() if rank == "0" else f"[rank {rank}] {text.strip()}"
