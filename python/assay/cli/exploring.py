"""`assay explore`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, ScoresFolder, fail, log_to_stderr, say


def explore(
    scores: ScoresFolder,
    port: Annotated[int, typer.Option(metavar="N", help="The port to listen on; a free one without it.")] = 0,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="SCORE", help="A score to show, in place of the first 24. May be given again."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="A column of the corpus to group by, in place of those with names such as label, source or language. "
            "May be given again.",
        ),
    ] = None,
    corpus: CorpusNow = None,
) -> int:
    """Serve a page on this machine on which cuts are dragged: what they keep, and the command that keeps it."""
    from assay.cli.reporting import label_column, shown_rows
    from assay.corpus.scores_folder import State, open_scores
    from assay.explore import open_explorer, open_server, select_command
    from assay.report import find_columns

    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port}: expected a number from 0 to 65535")
    log_to_stderr(quiet=True)
    found = open_scores(scores, corpus)
    columns = find_columns(found, group or (), label_column(found))
    with open_server(port) as server:
        server.explorer = open_explorer(
            found,
            columns,
            lambda where: select_command(scores, corpus, where),
            lambda rows: shown_rows(found, rows),
            by or (),
        )
        say(f"open {server.url}")
        say("the page is for this machine alone, and for whoever has this address; Ctrl-C ends it")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    unreadable = found.of(State.UNREADABLE)
    if not unreadable:
        return OK
    first = unreadable[0]
    return fail(f"{len(unreadable)} shards are not in it ({first.shard.path}: {first.detail})", INCOMPLETE)
