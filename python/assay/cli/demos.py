"""`assay demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.terminal import OK, log_to_stderr


def demo_digits(
    out: Annotated[Path, typer.Option(help="Where its files go.")] = Path("demo/digits"),
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 3,
) -> int:
    """Digits with wrong labels: score, select, train; curated against random and against everything."""
    from assay.demo import digits

    log_to_stderr(quiet=False)
    digits.main(out, seeds)
    return OK


def demo_text(
    out: Annotated[Path, typer.Option(help="Where its files go.")] = Path("demo/text"),
) -> int:
    """Text with planted junk, scored by a small language model."""
    from assay.demo import text

    log_to_stderr(quiet=False)
    text.main(out)
    return OK
