"""`assay duplicates`."""

from __future__ import annotations

from typing import Annotated

import typer

from assay.cli.terminal import OK, CorpusNow, ScoresFolder, say


def duplicates(
    scores: ScoresFolder,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the scores folder with what was found goes.")],
    name: Annotated[str, typer.Option(help="The name of the method minhash in SCORES.")] = "minhash",
    corpus: CorpusNow = None,
) -> int:
    """Find copies and near copies of earlier rows, by the signatures that the method minhash has made."""
    from assay.curate import find_duplicates

    found = find_duplicates(scores, out, name=name, corpus_path=corpus)
    print(
        f"of {found.rows:,} texts {found.copies:,} are copies of one before them, and {found.alike:,} more are like "
        "one (similarity 0.8 or more)"
    )
    say(f"scores: {out} (assay select … --with dup={out} --where 'dup.copies = 0 and dup.similarity < 0.8')")
    return OK
