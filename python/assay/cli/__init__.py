"""The command `assay`: a thin shell over the functions that Python users call, one file per group of commands.

Exit codes: 0 success; 1 it ran, but something was quarantined or unreadable; 2 bad usage, recipe or input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import typer

import assay
from assay.cli.demos import demo_digits, demo_text
from assay.cli.duplicates import duplicates
from assay.cli.experiments import prove, two_stage
from assay.cli.explaining import explain
from assay.cli.exploring import explore
from assay.cli.machine import doctor
from assay.cli.recipes import init, validate
from assay.cli.reporting import report
from assay.cli.runs import score
from assay.cli.scores import list_scores, show
from assay.cli.selection import select
from assay.cli.terminal import BAD, INTERRUPTED, OK, fail

__all__ = ["main"]

app = typer.Typer(
    help="Which of this data is worth training on?",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
demo = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(demo, name="demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Errors are one line, or a traceback with ASSAY_DEBUG=1."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="assay", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("ASSAY_DEBUG") == "1":
            raise
        return fail(_describe(error), BAD)
    if code == INTERRUPTED:  # some versions of typer turn the interrupt into this code themselves
        return fail("interrupted; run the same command again to go on where it stopped", INTERRUPTED)
    return code if isinstance(code, int) else OK


def _describe(error: Exception) -> str:
    usage = getattr(error, "format_message", None)  # click's errors, wherever typer takes click from
    if usage is not None:
        return f"{usage()} (see `assay --help`)"
    text = str(error)
    if isinstance(error, ValueError | ImportError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    return f"internal error: {type(error).__name__}: {text}; ASSAY_DEBUG=1 shows where"


def _version(asked: bool) -> None:
    if asked:
        print(f"assay {assay.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _help_without_command(context)


@demo.callback(help="Demonstrations on real data.")
def _demo_options(context: typer.Context) -> None:
    _help_without_command(context)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(init)
app.command()(score)
app.command()(validate)
app.command()(select)
app.command("two-stage")(two_stage)
app.command()(prove)
app.command()(duplicates)
app.command()(show)
app.command()(explain)
app.command()(report)
app.command()(explore)
app.command("ls")(list_scores)
app.command()(doctor)
demo.command("digits")(demo_digits)
demo.command("text")(demo_text)
