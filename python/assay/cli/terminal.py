"""What every command has in common: exit codes, lines for a terminal, and the log."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

OK, INCOMPLETE, BAD, INTERRUPTED = 0, 1, 2, 130

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
ScoresFolder = Annotated[str, typer.Argument(metavar="SCORES", help="A folder that `assay score` wrote.")]
CorpusNow = Annotated[
    str | None, typer.Option("--corpus", metavar="PATH", help="Where the corpus is now, if it has moved.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="MODULE", help="Let the recipe run Python of this module, and of those below it."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe: batch.tokens=4096"),
]


def fail(message: str, code: int) -> int:
    """A line on standard error; returns ``code``."""
    print(f"assay: {clean(message)}", file=sys.stderr)
    return code


def say(line: str) -> None:
    """A line for standard output: what data, recipes or files of other makers put into it stays one line."""
    print(clean(line))


def clean(text: str) -> str:
    """Text that may come from data, on one line and without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split("\n")))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def log_to_stderr(quiet: bool) -> None:
    """Send assay's log to standard error, ``quiet`` its errors alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("assay")
    log.handlers = [handler]
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries that load models
