"""`assay explore`."""

from __future__ import annotations

import functools
import sys
from typing import Annotated

import typer

from assay.cli.reporting import GroupColumns, ShownScores, label_column, make_page, shown_rows
from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, ScoresFolder, fail, log_to_stderr, say


def explore(
    scores: ScoresFolder,
    port: Annotated[int, typer.Option(metavar="N", help="The port to listen on; a free one without it.")] = 0,
    by: ShownScores = None,
    group: GroupColumns = None,
    corpus: CorpusNow = None,
) -> int:
    """Serve a page on this machine on which cuts are dragged: what they keep, and the command that keeps it."""
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
            functools.cache(lambda: make_page(found, by or (), group or ()).to_html()),
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
