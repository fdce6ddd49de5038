"""What a benchmark is called with: an option that it does not know is an error, not a run without it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a benchmark whose module has this docstring, without options yet."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def quick(doc: str | None) -> bool:
    """Whether a benchmark whose only option it is was called with ``--quick``."""
    own = parser(doc)
    own.add_argument("--quick", action="store_true", help="few seeds of small sizes, and nothing is written")
    asked: bool = own.parse_args().quick
    return asked


def some(doc: str | None, metavar: str, known: Iterable[str]) -> list[str]:
    """Which of the known names a benchmark, whose only arguments they are, was called with; without any, all of them.

    (``choices`` would refuse none.)
    """
    own, every = parser(doc), list(known)
    own.add_argument("names", nargs="*", metavar=metavar, help=f"some of {', '.join(every)}; none: all")
    names: list[str] = own.parse_args().names
    if unknown := [name for name in names if name not in every]:
        own.error(f"{unknown[0]}: expected some of {', '.join(every)}")
    return names or every


def cache(name: str) -> Path:
    """Where a benchmark keeps what took long, unless it is told another place."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "assay" / name
