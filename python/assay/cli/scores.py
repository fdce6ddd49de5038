"""`assay ls` and `assay show`."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._json import dumps
from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, ScoresFolder, Trust, clean, fail, log_to_stderr

if TYPE_CHECKING:
    from assay.corpus.pace import Pace
    from assay.corpus.scores_folder import Scores, ShardStatus

_LISTED_SHARDS = 50


def list_scores(
    scores: ScoresFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, every shard, as JSON.")] = False,
    corpus: CorpusNow = None,
) -> int:
    """List the shards: which are done, which have changed since, how many rows each has; and how a run gets on."""
    from assay.corpus.pace import measure_pace
    from assay.corpus.scores_folder import open_scores

    found = open_scores(scores, corpus)
    pace = measure_pace(found)
    if as_json:
        shards = [_line(status) | {"detail": status.detail} for status in found.shards]
        print(dumps({**vars(pace), **_rows(found), "shards": shards}, indent=2))
        return _looked(found)
    from rich.console import Console
    from rich.table import Table

    table = Table("shard", "state", "rows", "scored", "quarantined", box=None)
    for status in found.shards[:_LISTED_SHARDS]:
        table.add_row(*(clean("" if value is None else str(value)) for value in _line(status).values()))
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
    console.print(table)
    total = len(found.shards)
    if total > _LISTED_SHARDS:
        console.print(f"… and {total - _LISTED_SHARDS} more (--json lists all)")
    states = Counter(status.state.value for status in found.shards)
    console.print(f"{total} shards: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    rows = _rows(found)
    both = rows["scored"] + rows["quarantined"]
    console.print(f"rows {both:,} = scored {rows['scored']:,} + quarantined {rows['quarantined']:,}")
    if states.keys() & {"missing", "changed"}:
        console.print(_pace_line(pace))
    console.print(clean(f"scores: {', '.join(found.columns)}"))
    return _looked(found)


def _looked(found: Scores) -> int:
    """The exit code: whether every shard could be looked at."""
    from assay.corpus.scores_folder import State

    unknown = {status.shard.path: status.detail for status in found.of(State.UNKNOWN)}
    if not unknown:
        return OK
    return fail(f"{len(unknown)} shards could not be looked at; try again ({_first(unknown)})", INCOMPLETE)


def _rows(found: Scores) -> dict[str, int]:
    """Of all tables together, those of changed shards, too."""
    tables = [status.table for status in found.shards if status.table]
    return {"scored": sum(t.scored for t in tables), "quarantined": sum(t.quarantined for t in tables)}


def _pace_line(pace: Pace) -> str:
    if pace.running is False:
        return "no run is writing into it; `assay score` does what is missing"
    who = "a run is writing into it" if pace.running else "whether a run is writing into it cannot be told here"
    rate, left, idle = pace.rows_per_second, _duration(pace.seconds_left), _duration(pace.idle_seconds)
    shown = "unknown" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{who}; rows/s {shown}, left {left}, since the last table {idle}"


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


def _line(status: ShardStatus) -> dict[str, Any]:
    table = status.table
    return {
        "shard": status.shard.path,
        "state": status.state.value,
        "rows": table.rows if table else None,
        "scored": table.scored if table else None,
        "quarantined": table.quarantined if table else None,
    }


def show(
    scores: ScoresFolder,
    by: Annotated[str | None, typer.Option("--by", metavar="SCORE", help="The score to rank by.")] = None,
    worst: Annotated[int | None, typer.Option(metavar="N", help="So many of the worst samples.")] = None,
    best: Annotated[int | None, typer.Option(metavar="N", help="So many of the best.")] = None,
    nan: Annotated[int, typer.Option(metavar="N", help="So many whose score is not a number.")] = 0,
    keep: Annotated[
        str | None, typer.Option(metavar="high|low", help="Which end is better, if not as the table says.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Which tokens count in the loss.")] = False,
    trust: Trust = None,
    as_json: Annotated[bool, typer.Option("--json", help="The samples in full, as JSON.")] = False,
    corpus: CorpusNow = None,
) -> int:
    """Show the best and the worst samples themselves beside their scores."""
    from assay.cli.cards import make_cards, ranking_lines
    from assay.corpus.scores_folder import open_scores
    from assay.curate import rank

    log_to_stderr(quiet=True)
    found = open_scores(scores, corpus)
    if worst is None and best is None:
        worst, best = (0, 0) if nan else (5, 5)
    ranking = rank(found, by, best=best or 0, worst=worst or 0, without=nan, keep=keep)
    cards = make_cards(found, ranking, tokens, trust or ())
    if as_json:
        print(dumps([card.as_json() for card in cards], indent=2))
    else:
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 160)
        for line in ranking_lines(ranking, cards, width):
            print(line)
    faults = {card.where: card.fault for card in cards if card.fault}
    missing = [(ranking.left_out, "shards are not in it"), (faults, "samples cannot be shown")]
    said = [f"{len(reasons)} {what} ({_first(reasons)})" for reasons, what in missing if reasons]
    return fail("; ".join(said), INCOMPLETE) if said else OK


def _first(reasons: Mapping[str, str]) -> str:
    name, reason = next(iter(reasons.items()))
    return f"{name}: {reason}"
