"""`assay ls`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.terminal import OK, CorpusNow, ScoresFolder, clean

if TYPE_CHECKING:
    from assay.corpus.scores_folder import Scores

_LISTED_SHARDS = 50


def list_scores(
    scores: ScoresFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Every shard, as JSON.")] = False,
    corpus: CorpusNow = None,
) -> int:
    """List the shards: which are done, which have changed since, how many rows each has."""
    from assay.corpus.scores_folder import open_scores

    found = open_scores(scores, corpus)
    lines = _shard_lines(found)
    if as_json:
        print(json.dumps(lines, indent=2))
        return OK
    from rich.console import Console
    from rich.table import Table

    table = Table("shard", "state", "rows", "scored", "quarantined", box=None)
    for line in lines[:_LISTED_SHARDS]:
        table.add_row(*(clean("" if value is None else str(value)) for value in line.values()))
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
    console.print(table)
    if len(lines) > _LISTED_SHARDS:
        console.print(f"… and {len(lines) - _LISTED_SHARDS} more (--json lists all)")
    states = Counter(line["state"] for line in lines)
    console.print(f"{len(lines)} shards: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    console.print(clean(f"scores: {', '.join(found.columns)}"))
    return OK


def _shard_lines(scores: Scores) -> list[dict[str, Any]]:
    lines = []
    for status in scores.shards:
        table = status.table
        lines.append(
            {
                "shard": status.shard.path,
                "state": status.state.value,
                "rows": table.input.rows if table else None,
                "scored": table.rows.scored if table else None,
                "quarantined": table.rows.quarantined if table else None,
            }
        )
    return lines
